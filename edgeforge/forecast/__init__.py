"""What `plan` does: what a model takes on a phone, and how fast it can be, before any export."""
