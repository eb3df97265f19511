"""Core ML packages: the format, what writes it from a program and a store, what reads it back."""
