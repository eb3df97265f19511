"""Exporters: each writes a traced program and its weight store as an artifact of one runtime."""

DISTRIBUTION = "edgeforge"
