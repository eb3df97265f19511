"""Runs Core ML packages without Core ML: a saved package's numbers, checked on any machine."""
