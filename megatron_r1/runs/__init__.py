"""What every run has: folder, set-up, resume, initial weights, prompts."""
