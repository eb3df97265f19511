"""ExecuTorch programs (.pte) with the XNNPACK delegate, written without ExecuTorch itself."""
