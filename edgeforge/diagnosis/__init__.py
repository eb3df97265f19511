"""Where an artifact loses accuracy: layer by layer, and weight by weight."""
