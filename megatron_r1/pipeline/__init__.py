"""Recipes: stages with dependencies, each a run of its own, which run in order and resume."""
