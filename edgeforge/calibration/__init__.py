"""What calibrated quantizers look at: a text, and the activations it makes."""
