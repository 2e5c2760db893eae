"""Recording of metrics: always to a local file, and to wandb."""
