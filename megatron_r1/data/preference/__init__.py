"""Preference pairs and labelled responses, tokenized for reward models and policies."""
