"""From a recipe's name to a plan, and the mixed recipes that choose formats under a budget."""
