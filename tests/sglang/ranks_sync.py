"""Run on every rank of a layout: ten weight updates to one real server, log-probabilities compared after each.

Started by test_layout_sync.py with a folder that holds job.json: {"parallel": {...}}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

UPDATES = 10


def main(folder: Path) -> None:
    from megatron_r1.config.data import DataConfig
    from megatron_r1.config.model import ModelConfig
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.config.rollout import RolloutConfig, SGLangConfig
    from megatron_r1.data.tokenizer import train_tokenizer
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    platform = select("cpu")
    degrees = ParallelConfig(**json.loads((folder / "job.json").read_text())["parallel"])
    shape = ModelConfig(init_std=0.08)
    train_tokenizer(DataConfig(num_documents=2000)).save(folder / "tokenizer")
    rollout = RolloutConfig(sglang=SGLangConfig(max_running_requests=16, max_total_tokens=4096))
    with process_groups(platform, degrees, seed=0, threads=1):
        from megatron_r1.model.build import build_model
        from megatron_r1.rollout.choose import shared_sglang_engine

        model = build_model(shape, degrees, platform, seed=0)
        model.eval()
        gaps, checksums = [], []
        with shared_sglang_engine(rollout, shape, model, folder / "tokenizer", folder / "logs", "cpu") as engine:
            for version in range(UPDATES + 1):
                if version:
                    disturb(model, version)
                engine.update_weights(str(version))
                gaps.append(gap(model, engine))
                if dist.get_rank() == 0:
                    checksums.append(engine.engine.checksums())
        if dist.get_rank() == 0:
            (folder / "seen.json").write_text(json.dumps({"gaps": gaps, "checksums": checksums}))


def disturb(model: Any, version: int) -> None:
    """Change every weight by noise that depends on its name and the version, whatever the layout."""
    from megatron_r1.model.shards import shards

    for shard in shards(model):
        generator = torch.Generator().manual_seed(version * 1_000_003 + sum(shard.name.encode()))
        noise = torch.randn(shard.whole_shape, generator=generator)[shard.place]
        shard.tensor.add_(noise * (0.05 if shard.name.endswith("expert_bias") else 0.02))


def gap(model: Any, engine: Any) -> float:
    """Largest difference between the engine's log-probs of its answers and the trainer's, over all ranks' layout."""
    from megatron_r1.parallel import comm
    from megatron_r1.parallel.mesh import tensor_parallel_group
    from megatron_r1.rl.policy import Policy
    from megatron_r1.rl.rows import make_rows
    from megatron_r1.rollout.sample import Request, Sample, Sampling

    generator = torch.Generator().manual_seed(5)
    prompts = [tuple(torch.randint(5, 512, (n,), generator=generator).tolist()) for n in (4, 9, 17, 30)]
    completions = None
    if dist.get_rank() == 0:
        requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
        completions = engine.engine.generate(requests, Sampling(1.0, 1.0, 16, (), 0))
    samples = [
        Sample("p", 0, c.prompt_tokens, c.response_tokens, c.logprobs, c.weight_version, "length", "", 0.0, {})
        for c in comm.broadcast(completions)
    ]
    multiple = dist.get_world_size(tensor_parallel_group())
    rows = make_rows(samples, range(len(samples)), torch.zeros(len(samples)), 0, "cpu", multiple)
    worst = 0.0
    for place, log_probs_L in Policy(model, 1.0).log_probs_by_sample([rows]).items():
        difference_L = (log_probs_L - rows.rollout_log_probs_BL[place]).abs()
        worst = max(worst, float(difference_L[rows.mask_BL[place]].max()))
    return max(comm.AllRanks().gather(worst))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
