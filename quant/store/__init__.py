"""Where quantized weights lie: one mapped file, filled tensor by tensor."""
