"""Measurements: what `bench` does around the protocol: devices, prompts, files and history."""
