"""Transformer Engine's own modules, optimizer and autograd functions, computing on a machine without a GPU."""
