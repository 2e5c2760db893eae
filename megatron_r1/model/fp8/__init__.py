"""FP8 linear layers: which they are, how they are quantised, and their three products computed without a GPU."""
