"""The quantizers, one file each, and their registry."""
