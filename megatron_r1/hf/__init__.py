"""Hugging Face folders: names, config, export and load."""
