"""Reads checkpoints that another tool quantized, and keeps their integers as they are."""
