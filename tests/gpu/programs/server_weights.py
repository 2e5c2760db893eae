"""server_weights.py PLATFORM METHOD FOLDER [KEY=VALUE ...]: a server's log-probs beside the model's, around a sync.

The model is trained first, so that its distributions are far from uniform, and every weight is then moved by a tenth of
its size: without a sync the server is wrong by far. METHOD is `group`, `ipc` or `disk`; keys are those of `rollout`.
FOLDER/found.json gets the gaps: `first` after the first sync, `stale` of moved weights before the second, `second`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_r1.config.load import load
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.platform import select

STEPS = 150


def main(device: str, method: str, folder: Path, *overrides: str) -> None:
    # The latent of 512 + 64 is what FlashAttention's and FlashMLA's kernels serve; FP8 takes blocks of 128.
    wide = ["model.attention.kv_lora_rank=512", "model.attention.qk_rope_head_dim=64", "model.dtype=bf16"]
    wide += ["model.moe.ffn_hidden_size=128", "model.attention.q_lora_rank=128"]
    shared = ["rollout.sglang.server.memory_fraction=0.3", *["rollout.placement=colocated"] * (method == "ipc")]
    settings = [f"rollout.weight_sync.method={method}", "rollout.max_response_tokens=24", "model.num_layers=2"]
    config = load("grpo", [*settings, *((*wide, *shared) if device == "cuda" else ()), *overrides])
    platform = select(device)
    from megatron_r1.model.build import build_model, native_tensors
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.rollout.factory import sglang_engine
    from tests.gpu.programs.gradients import move
    from tests.support.trained import gap, train

    train_tokenizer(config.data).save(folder / "tokenizer")
    with process_groups(platform, config.parallel, seed=0, threads=1, timeout_minutes=20):
        model = build_model(config.model, config.parallel, platform, seed=0)
        found = {"entropy": train(model, STEPS, platform.device)}
        rollout, logs = config.rollout, folder / "logs"
        with sglang_engine(
            rollout, config.model, lambda: native_tensors(model), folder / "tokenizer", logs, device
        ) as (engine, sync):
            sync.push("first")
            found["first"] = gap(model, engine, "first", platform.device)
            move(model, 0.1)
            found["stale"] = gap(model, engine, "first", platform.device)
            sync.push("second")
            found["second"] = gap(model, engine, "second", platform.device)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
