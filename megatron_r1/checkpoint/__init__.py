"""Checkpoints that are complete or do not exist: manifest and commit protocol."""
