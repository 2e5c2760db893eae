"""What a job checks on its nodes before it builds a model: GPUs, network, run folder, disk, shared memory, judge."""
