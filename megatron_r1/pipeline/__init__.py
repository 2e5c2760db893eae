"""Recipes: stages that need one another, each a run of its own, gone through in order and resumable."""
