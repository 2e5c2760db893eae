"""Benchmarks of models, and confidence intervals."""
