"""ONNX: a graph of contrib operators for ONNX Runtime's CPU and mobile packages."""
