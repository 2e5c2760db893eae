"""Every verb on folders that transformers wrote, in one process: tests/commands/test_model_named_once.py.

python folder_verbs.py FOLDER writes a folder of each family there, and one whose model always ends a turn as ChatML
does and whose tokenizer ends texts in another token; runs verbs on them, naming the model by init.from alone; and
writes FOLDER/found.json: exit statuses. With --others it runs each family's other verbs alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_r1.__main__ import exit_code
from megatron_r1.platform import select
from tests.support.chats import small_tokenizer
from tests.support.hf_folders import SHAPES, edit_tensors, write_folder_of

BRIEF = ("platform=cpu", "threads=1", "track=off", "train.steps=1", "train.schedule.warmup_steps=0")
PAIRS = ("train.global_batch_size=4", "train.micro_batch_size=4", "train.sequence_length=384")
RESPONSES = ("rollout=local", "rollout.max_response_tokens=8")
ROLLOUT = (*RESPONSES, "rl.prompts_per_rollout=2", "rl.group_size=2", "rl.updates_per_rollout=1")
VERBS = {
    "sft": (*BRIEF, "sft.num_conversations=24", "sft.eval_examples=4", "train.sequence_length=256"),
    "grpo": (*BRIEF, *ROLLOUT),
    "reward_model": (*BRIEF, *PAIRS, "reward_model.num_examples=8", "reward_model.eval_examples=2"),
    "dpo": (*BRIEF, *PAIRS, "dpo.num_pairs=8", "dpo.eval_examples=2"),
    "sample": ("platform=cpu", "threads=1", *RESPONSES, "sample.max_prompts=2"),
    "evaluate": ("platform=cpu", "threads=1", *RESPONSES, "evaluate.num_prompts=2", "evaluate.samples_per_prompt=2"),
    "convert": ("convert.to=native",),
}
ALWAYS = {kind: [*VERBS] if kind in ("llama", "deepseek_v3") else ["sft", "convert"] for kind in SHAPES}
"""Family -> verbs without --others: all, of a dense model and of one of DeepSeek's; of others one that trains, and one
that converts."""
CHAT = "rollout.chat_template=tokenizer"


def write_ending(folder: Path) -> None:
    """A model whose most likely token is always <|im_end|>: it reads the first number, which all tokens have alike."""
    write_folder_of("llama", folder, end_token="<|eos|>")
    end = small_tokenizer().id("<|im_end|>")

    def change(stored: dict[str, torch.Tensor]) -> None:
        for name, tensor in stored.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")) or name == "lm_head.weight":
                tensor.zero_()
        stored["model.embed_tokens.weight"][:, 0] = 1.0
        stored["lm_head.weight"][end, 0] = 20.0

    edit_tensors(folder / "model.safetensors", change)
    assert load_file(folder / "model.safetensors")["lm_head.weight"][end, 0] == 20


def main(folder: Path, others: bool) -> None:
    select("cpu")

    def run(name: str, verb: str, source: str, *overrides: str) -> int:
        return exit_code([verb, f"root={folder}", f"name={name}", f"init.from={source}", *VERBS[verb], *overrides])

    found = {}
    for kind in SHAPES:
        write_folder_of(kind, folder / kind)
        verbs = [verb for verb in VERBS if (verb in ALWAYS[kind]) != others]
        found[kind] = {verb: run(f"{kind}-{verb}", verb, f"hf:{folder / kind}") for verb in verbs}
    if not others:
        found |= run_of_special_folders(folder, run)
    (folder / "found.json").write_text(json.dumps(found))


def run_of_special_folders(folder: Path, run: Callable[..., int]) -> dict[str, dict[str, int]]:
    """Verbs on a run of sft, and on the model that ends a turn at once."""
    found: dict[str, dict[str, int]] = {}
    # A run names its model as a folder does.
    trained = f"{folder}/deepseek_v3-sft"
    found["run"] = {verb: run(f"run-{verb}", verb, trained) for verb in ("grpo", "sample", "convert")}
    changes = ("model.dtype=bf16", "model.max_sequence_length=300", "model.mtp.num_layers=0")
    found["run"]["changed"] = run("run-changed", "sft", f"hf:{folder}/deepseek_v3", *changes)
    write_ending(folder / "ending")
    still = "train.schedule.learning_rate=1e-9"
    plans = {
        "sample": ("sample", f"hf:{folder}/ending", CHAT, "rollout.temperature=0.0"),
        "evaluate": ("evaluate", f"hf:{folder}/ending", CHAT),
        "grpo": ("grpo", f"hf:{folder}/ending", CHAT, still),
        "dpo": ("dpo", f"hf:{folder}/ending", CHAT, still),
        "sft": (
            "sft",
            f"hf:{folder}/ending",
            "sft.chat_template=tokenizer",
            still,
            "train.schedule.min_learning_rate=0",
        ),
        "after": ("sample", f"{folder}/ending-sft", CHAT, "rollout.temperature=0.0"),
        "grpo-export": ("convert", f"{folder}/ending-grpo", "convert.to=hf"),
        "sft-export": ("convert", f"{folder}/ending-sft", "convert.to=hf"),
        "again-native": ("convert", f"hf:{folder}/ending-sft-export/hf"),
        "again": ("convert", f"{folder}/ending-again-native", "convert.to=hf"),
    }
    found["ending"] = {name: run(f"ending-{name}", *plan) for name, plan in plans.items()}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] == ["--others"])
