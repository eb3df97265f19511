"""The file formats of a checkpoint: safetensors, zipped pickles, JSON, the hub's cache, digests."""
