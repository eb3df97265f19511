"""Lowers traced modules to ONNX: a handler for each operator that torch's decompositions leave."""
