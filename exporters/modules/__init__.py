"""Any PyTorch module: its traced program and quantized weights in, an artifact of a target out."""
