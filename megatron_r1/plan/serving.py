"""What reinforcement learning costs beside FLOPs and bytes: constants, and what a software stack does between phases.

No constant of the trainer's time model is fitted here (constants.py). Three constants of this file are fitted to
published steps of reinforcement learning (tools/plan/fit_rl.py, README.md of this folder); the others are read off
measurements of one thing each.
"""

from __future__ import annotations

from dataclasses import dataclass

NEXT_FIT, FIRST_FIT, NO_PACKING = "next fit", "first fit", "none"
UNCERTAINTY = 0.3
"""Relative error of a step within which published steps of other software are (README.md of this folder)."""


@dataclass(frozen=True, slots=True)
class ServingConstants:
    """Of decoding steps, and of sending weights."""

    memory: float = 0.9
    """Share of the memory's bandwidth that decoding reaches: FlashMLA's 3,000 GB/s on H800 (its README)."""
    link: float = 0.7
    """Share of a link that sending many bytes reaches: three broadcasts of whole models over NCCL take 10.8, 58.3 and
    53.3 s (miles, docs/advanced/p2p-weight-transfer.md), with 0.87, 0.51 and 0.75 of one network card."""
    kernel: float = 4e-6
    """Seconds of a small kernel in a CUDA graph. Source: Qwen3-30B-A3B on one A100 takes 9.6 ms a token with one
    request (tt-inference-server, issue 340), of which reading the weights takes 3.4 ms and the host some 3."""
    near_hop: float = 3.3e-6
    """Seconds of one doubling of the GPUs that an all-reduce over NVLink spans: 10 us for eight, as one-shot kernels
    take for small messages."""
    between_nodes: float = 3e-5
    """Seconds of a small all-reduce over NVLink between nodes, out of reach of one-shot kernels: NCCL's, unverified."""
    network: float = 8e-5
    """Fitted: seconds of an all-reduce over the network, for each doubling of the nodes that it spans."""
    step: float = 4e-3
    """Fitted: seconds of the host for each decoding step, where its work is not hidden behind the GPU's."""
    sequence: float = 5e-5
    """Fitted: seconds of the host for each sequence of a decoding step, in the same case."""


@dataclass(frozen=True, slots=True)
class RolloutStack:
    """What a software stack does between sampling and training."""

    name: str = "megatron_r1"
    hides_host: bool = True
    """Whether the server prepares a decoding step on the host while the GPU does the one before, as SGLang does."""
    pageable_bytes: float = 0.0
    """Bytes/s at which a GPU's memory is copied to host memory and back; 0 takes the link, as pinned memory does."""
    gathers_model: bool = False
    """Whether every GPU of the trainer gathers the whole model for its server."""
    packing: str = NEXT_FIT
    """How responses, long ones first, fill micro-batches: next fit (the last one while it has room, as
    train/batching.py), first fit (the first one with room) or none (each has one of its own)."""
    padded: bool = False
    """Whether pipelined micro-batches are filled up to their largest size."""
    in_flight: bool = False
    """Whether servers go on sampling while they receive weights."""
    scored_together: float = 1.0
    """Micro-batches of an update that one pass for log-probabilities takes together."""
    loss_seconds: float = 0.0
    """Seconds that a rank's host takes for one response's loss and its gradient."""
    score_seconds: float = 0.0
    """Seconds that a rank's host takes for one response's log-probabilities."""
    response_seconds: float = 0.0
    """Seconds of the host for each response between phases: text, reward, batch."""


PINNED = 0.8
"""Share of the link to host memory that a copy of pinned memory reaches: typical of PCIe, unverified here."""
