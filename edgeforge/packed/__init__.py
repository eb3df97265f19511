"""Checkpoints that were quantized elsewhere: their integers and scales, read as they are."""
