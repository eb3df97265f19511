"""Measuring: how an artifact is timed so that the figure can be trusted, on any kind of device."""
