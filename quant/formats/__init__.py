"""How a weight is stored: integer, float and palette formats, and packed codes."""
