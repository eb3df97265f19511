"""Checkpoints of random weights at released models' true shapes."""
