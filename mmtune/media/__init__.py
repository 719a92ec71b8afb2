"""Media files: safe paths, header probe, decoding."""
