"""Facts read from an artifact's files and held against the checkpoint."""
