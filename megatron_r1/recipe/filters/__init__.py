"""Filters of single rows: small pure functions, one file a concern."""
