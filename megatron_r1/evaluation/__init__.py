"""Benchmarks that models are measured by, and confidence intervals."""
