"""Reward models and direct preference optimization."""
