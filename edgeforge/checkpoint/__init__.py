"""Reads a checkpoint from disk or the hub: configuration, tensors by rows, tokenizer, digests."""
