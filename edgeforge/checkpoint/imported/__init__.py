"""Checkpoints that were quantized elsewhere, whose integers are kept."""
