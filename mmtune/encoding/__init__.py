"""Encoding: a conversation to ids, loss mask and media spans, exactly as the family's own template renders it."""
