"""Recipes, plans and algorithm names: which format and algorithm each weight gets."""
