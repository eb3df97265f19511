"""Artifacts as models of other tools; each file needs its tool, which an extra brings."""
