"""EdgeForge compiles language models for phones: one trace, one quantization, proven artifacts."""

DISTRIBUTION = "edgeforge"
