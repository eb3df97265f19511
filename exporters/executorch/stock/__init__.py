"""The same program and store lowered by ExecuTorch's own exporter, whole or for other delegates."""
