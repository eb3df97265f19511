"""Generates text with an artifact: sampling, and the loop of `edgeforge run`."""
