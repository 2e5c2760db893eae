"""Common parts of all runs: folder, set-up, resume, initial weights, prompts."""
