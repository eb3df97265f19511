"""Makes the plan of a recipe; the mixed recipes choose formats under a budget."""
