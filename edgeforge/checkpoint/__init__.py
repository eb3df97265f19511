"""A checkpoint on disk or on the hub: configuration, tensors read by rows, tokenizer, digests."""
