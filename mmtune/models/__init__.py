"""Models as tensors: loading, towers, adapters. Knows no recipe and no dataset."""
