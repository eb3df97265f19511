"""The weight store: one memory-mapped file of quantized weights, filled tensor by tensor."""
