"""Where a run's metrics go: a local record, always, and wandb."""
