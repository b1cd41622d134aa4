"""Checkpoints: what they say about themselves, finding, loading, writing and converting them."""
