"""Prompts of a world or of a user's file."""
