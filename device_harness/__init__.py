"""Runs an artifact on a device or on this host, and times it."""

DISTRIBUTION = "edgeforge"
