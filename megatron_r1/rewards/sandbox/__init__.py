"""Runs programs that a model wrote in a sandbox."""
