"""A small all-reduce over the job's ranks, and its bandwidth. On GPUs (NCCL) `unverified`."""

from __future__ import annotations

import statistics
import time
from datetime import timedelta

MIB = 1 << 20
SIZE_MIB = {"cuda": 64, "cpu": 4}
ROUNDS, WARM_UP = 5, 2


def all_reduce(device: str, local_rank: int, timeout_s: float) -> str:
    """Collective over the ranks of the launcher's variables: sum a tensor over them; returns what to show.

    Bandwidth is that of the bus, 2 (n - 1) / n times the bytes over the seconds, as nccl-tests counts it: independent
    of the number of ranks.

    Raises:
        RuntimeError: ranks do not reach each other, or the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        ranks = dist.get_world_size()
        values = torch.empty(SIZE_MIB[device] * MIB // 4, device=device)
        seconds = []
        for _ in range(WARM_UP + ROUNDS):
            values.fill_(float(dist.get_rank() + 1))
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        expected = ranks * (ranks + 1) / 2
        if not bool((values == expected).all()):
            raise RuntimeError(f"the sum over {ranks} ranks is not {expected:g} everywhere")
    finally:
        dist.destroy_process_group()
    speed = 2 * (ranks - 1) / ranks * SIZE_MIB[device] * MIB / statistics.median(seconds[WARM_UP:]) / 1e9
    return f"{ranks} ranks by {backend}, {SIZE_MIB[device]} MiB: {speed:.3g} GB/s on the bus"
