"""What is checked of a job before it queues: on a login node, without GPUs and without torch."""
