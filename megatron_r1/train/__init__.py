"""The training loop, its step and what hangs on it."""
