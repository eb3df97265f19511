"""How a weight is stored: integers, floats and palettes, and their bits in bytes."""
