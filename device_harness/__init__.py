"""Runs an artifact on this host and times it."""

DISTRIBUTION = "edgeforge"
