"""Hugging Face DeepSeek-V3 folders: names, config, export and load."""
