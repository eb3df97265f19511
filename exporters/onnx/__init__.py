"""ONNX: graphs that use contrib operators, for ONNX Runtime's CPU and mobile packages."""
