"""Writes checkpoints of random weights in the shapes of released models."""
