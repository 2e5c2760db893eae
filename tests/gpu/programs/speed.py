"""speed.py PLATFORM PRECISION LAYERS STEPS FILE: updates of a model of DeepSeek-V3's width on the same sequences.

PRECISION is `bf16` or `fp8`. FILE gets losses, tokens a second and the most memory in use, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config.load import load
from megatron_r1.platform import select

SMALL = "model.hidden_size=256 model.num_attention_heads=4 model.ffn_hidden_size=512 model.vocab_size=512".split()


def main(device: str, precision: str, layers: int, steps: int, file: str) -> None:
    settings = ["model=v3_proxy", f"model.num_layers={layers}", f"fp8={'deepseek' if precision == 'fp8' else 'off'}"]
    settings += ["performance.recompute_modules=[layernorm,mla_up_proj,moe_act]", "train.optimizer.moments_dtype=bf16"]
    config = load("pretrain", settings + (SMALL if device == "cpu" else []))
    platform = select(device)
    from megatron_r1.model.build import build_model
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update

    length = 128 if device == "cpu" else config.model.max_sequence_length
    draw = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {"losses": [], "seconds": []}
    with process_groups(platform, config.parallel, seed=0, threads=1, timeout_minutes=10):
        performance = replace(config.performance)
        model = build_model(config.model, config.parallel, platform, 0, performance, config.fp8)
        optimizer = Optimizer(model, config.train, performance)
        rows_BL = torch.randint(0, config.model.vocab_size, (2, length + 1), generator=draw).to(platform.device)
        for _ in range(steps):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            result = update(model, optimizer, rows_BL.split(1), next_token_forward, 1e-4, length)
            torch.cuda.synchronize()
            found["seconds"].append(time.perf_counter() - begun)
            found["losses"].append(float(torch.stack([one["train/loss"] for one in result.passes.logged]).mean()))
            assert not result.skipped, "a gradient is not finite"
        found["tokens_per_second"] = 2 * length / sorted(found["seconds"])[steps // 2]
        found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
