"""Run on every rank of a layout: weight updates to real servers that run already, looked at after each.

Started by test_layout_sync.py with a folder that holds job.json: {"parallel": degrees, "updates": how many,
"tensor_parallel": of a server, "refused": whether to send to nobody at last} and `servers`, the servers' addresses.
Writes seen.json: log-prob differences and checksums by version; of the last update the bytes that were sent, counted at
the calls that send them, and the most that new tensors held.
"""

from __future__ import annotations

import json
import socket
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(folder: Path) -> None:
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select
    from tests.support.attached import BUCKET, Attached, find

    platform, job = select("cpu"), json.loads((folder / "job.json").read_text())
    degrees = ParallelConfig(**job["parallel"])
    with process_groups(platform, degrees, seed=0, threads=1):
        from megatron_r1.model.build import build_model
        from megatron_r1.model.shards import shards, stage_leaders
        from megatron_r1.parallel.comm import all_gather_object
        from megatron_r1.rollout.sync.group_sender import GroupSender
        from megatron_r1.rollout.sync.payload import WeightPayload
        from megatron_r1.rollout.sync.strategies import StageSync
        from tests.support.layouts import model_of
        from tests.support.live_bytes import LiveBytes

        shape, rank, endpoints = model_of("tiny"), dist.get_rank(), find(folder / "servers")
        model = build_model(shape, degrees, platform, seed=0)
        model.eval()
        engine = Attached(endpoints) if rank == 0 else None
        width, leads = job["tensor_parallel"], rank in stage_leaders()
        seen: dict[str, Any] = {"gaps": [], "checksums": []}
        sender = GroupSender(endpoints, f"{folder.name}-{rank}", width, timeout_s=60.0) if leads else None
        with sender or nullcontext():
            sync = StageSync(engine, sender, model, WeightPayload(shape), BUCKET)
            with CountedSends() as sent:
                for version in range(1, job["updates"] + 1):
                    disturb(model, version)
                    sent.clear()
                    with LiveBytes(shard.tensor for shard in shards(model)) as live:
                        sync.push(str(version))
                    seen["live"] = all_gather_object(live.most)
                    seen["sent"] = all_gather_object(dict(sent))
                    seen["gaps"].append(gap(model, engine, len(endpoints)))
                    seen["checksums"].append(engine.checksums() if engine else None)
        if job["refused"]:
            seen["refused"] = all_gather_object(refused(model, shape, leads))
        if rank == 0:
            (folder / "seen.json").write_text(json.dumps(seen))


def refused(model: Any, shape: Any, leads: bool) -> str:
    """What this rank is told when nobody receives."""
    from megatron_r1.errors import NoRolloutCapacity
    from megatron_r1.rollout.sglang.client import Endpoint
    from megatron_r1.rollout.sync.group_sender import GroupSender
    from megatron_r1.rollout.sync.payload import WeightPayload
    from megatron_r1.rollout.sync.strategies import StageSync
    from tests.support.attached import BUCKET

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = [Endpoint(f"http://127.0.0.1:{closed.getsockname()[1]}", "", "")]
        with GroupSender(nobody, f"refused-{dist.get_rank()}", timeout_s=3.0) if leads else nullcontext() as sender:
            try:
                StageSync(None, sender, model, WeightPayload(shape), BUCKET).push("refused")
            except NoRolloutCapacity as error:
                return str(error)
    return ""


class CountedSends:
    """Counts the buckets, the bytes of every send that gathers weights, by receiver, and of every broadcast."""

    def __enter__(self) -> Counter[str]:
        from megatron_r1.model import shards
        from megatron_r1.rollout.sync.group_sender import GroupSender

        counts: Counter[str] = Counter()
        self._shards, self._send, self._broadcast = shards, shards.dist, dist.ProcessGroup.broadcast
        self._sender, self._bucket = GroupSender, GroupSender._broadcast

        class Counting:
            def __getattr__(self, name: str) -> Any:
                return getattr(dist, name)

            def send(self, tensor: torch.Tensor, to: int) -> None:
                counts[f"to {to}"] += tensor.nbytes
                dist.send(tensor, to)

        def broadcast(group: dist.ProcessGroup, what: Any, *others: Any) -> Any:
            if isinstance(what, torch.Tensor):  # torch's own calls give a list
                counts["broadcast"] += what.nbytes
                counts["receivers"] = group.size() - 1
            return self._broadcast(group, what, *others)

        def bucket(sender: GroupSender, *what: Any) -> None:
            counts["buckets"] += 1
            self._bucket(sender, *what)

        shards.dist, dist.ProcessGroup.broadcast, GroupSender._broadcast = Counting(), broadcast, bucket
        return counts

    def __exit__(self, *_: object) -> None:
        self._shards.dist, dist.ProcessGroup.broadcast = self._send, self._broadcast
        self._sender._broadcast = self._bucket


def disturb(model: Any, version: int) -> None:
    """Change every weight by noise that depends on its name and the version, whatever the layout."""
    from megatron_r1.model.shards import shards

    for shard in shards(model):
        generator = torch.Generator().manual_seed(version * 1_000_003 + sum(shard.name.encode()))
        noise = torch.randn(shard.whole_shape, generator=generator)[shard.index]
        shard.tensor.add_(noise * (0.05 if shard.name.endswith("expert_bias") else 0.02))


def gap(model: Any, engine: Any, servers: int) -> float:
    """How far every server's log-probs of its responses are from the trainer's, over all ranks' layout."""
    from megatron_r1.parallel import comm
    from megatron_r1.parallel.mesh import tensor_parallel_group
    from megatron_r1.rl.policy.batch import make_batch
    from megatron_r1.rl.policy.policy import Policy
    from megatron_r1.rollout.engine import Request, Sampling
    from tests.support.agreement import disagreement
    from tests.support.samples import sample_of

    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(5, 512, (n,), generator=generator).tolist()) for n in (4, 9, 17, 30)]
    completions = None
    if engine:
        requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
        completions = engine.generate(requests, Sampling(1.0, 1.0, 16, (), 0))
        assert len(completions) == servers * len(prompts)
    samples = [sample_of(completion) for completion in comm.broadcast(completions)]
    multiple = dist.get_world_size(tensor_parallel_group())
    rows = make_batch(samples, range(len(samples)), 0, "cpu", multiple)
    log_probs = Policy(model, 1.0).logprobs_by_sample([rows])
    if not log_probs:  # no last pipeline stage
        return max(comm.all_gather_object(0.0))
    differences_BL = (rows.gather(log_probs) - rows.rollout_logprobs_BL).masked_fill(~rows.mask_BL, 0.0)
    return max(comm.all_gather_object(disagreement(differences_BL.abs().amax(1).tolist())))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
