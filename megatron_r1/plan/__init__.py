"""Plans a job before a GPU is requested: which layout, how much memory, how long, how much."""
