"""Finds why engine and trainer log-probabilities differ: tries known causes on a saved batch."""
