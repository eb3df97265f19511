"""A program run by the reference operators, layer by layer, in bounded memory."""
