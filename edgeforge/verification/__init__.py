"""FLOAT, QUANTIZED and ARTIFACT on the same tokens, and what lies between them."""
