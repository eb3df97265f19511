"""The cards of artifacts: what one holds, what was measured of it, and how to run it."""
