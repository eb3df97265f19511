"""The model of a checkpoint: its weights by program name, its traced decoder, its rotations."""
