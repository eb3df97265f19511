"""Exporters: a traced program and a weight store in, an artifact out."""

DISTRIBUTION = "edgeforge"
