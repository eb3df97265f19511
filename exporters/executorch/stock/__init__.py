"""Lowers the same program and store by ExecuTorch's exporter, for XNNPACK, Vulkan or Core ML."""
