"""Text from an artifact: sampling, and the loop of `edgeforge run`."""
