"""What every test starts from: one thread, no network, and a deadline (pytest-timeout, in pyproject.toml)."""

from __future__ import annotations

import os

# Set before torch is imported: two cores shared by the threads of several libraries are slower than one used well, and
# sums over one thread have one order. Child processes inherit all of it.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "agg")
