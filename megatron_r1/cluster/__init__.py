"""Jobs of a SLURM cluster: their scripts, their submission, and how they restart."""
