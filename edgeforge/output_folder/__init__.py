"""Output folders that appear whole or not at all, and never in place of what is a user's."""
