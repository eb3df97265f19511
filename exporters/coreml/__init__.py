"""Core ML packages: the file format, writing it from a program and a store, and reading it back."""
