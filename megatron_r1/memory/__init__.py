"""How much memory a job takes, in parts, from its configuration alone: without torch, without a GPU."""
