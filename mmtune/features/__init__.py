"""Features: arrays that stand for media, kept on disk."""
