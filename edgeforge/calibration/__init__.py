"""Calibration: draws a text, runs the model on it, and quantizes weights on its activations."""
