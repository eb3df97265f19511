"""ExecuTorch's own XNNPACK kernels for arm64, taken from its aarch64 wheel, without torch."""
