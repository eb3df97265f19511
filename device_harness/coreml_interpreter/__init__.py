"""Runs Core ML packages without Core ML, so that any machine can check a package's numbers."""
