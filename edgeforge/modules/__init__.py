"""Any PyTorch module: traced, quantized, written for targets and verified, as models are."""
