"""A checkpoint that was understood: its weights by program name, and its traced decoder."""
