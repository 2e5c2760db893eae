"""Checkpoints that are whole or not there: manifest and commit protocol."""
