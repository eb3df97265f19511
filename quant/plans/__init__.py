"""Which format and algorithm each weight gets: recipes, plans, the names of algorithms."""
