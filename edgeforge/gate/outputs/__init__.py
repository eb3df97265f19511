"""A check's result in the forms that people and machines read."""
