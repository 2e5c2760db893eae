"""How far the in-process engine's log-probs are from a full forward pass of the same model, by shape.

Prompts of unlike lengths share a batch, so that the shorter ones are padded on the left, which the attention must not
see. Writes FOLDER/gaps.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select

PLATFORM = select("cpu")

from megatron_r1.model.build import build_model, without_multi_token_prediction  # noqa: E402
from megatron_r1.rollout.engine import Request, Sampling  # noqa: E402
from megatron_r1.rollout.in_process import LocalEngine  # noqa: E402
from tests.support.layouts import model_of  # noqa: E402
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of  # noqa: E402


@torch.no_grad()
def gap(shape: str) -> float:
    model = build_model(model_of(shape), ParallelConfig(), PLATFORM, seed=0).eval()
    draw = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(5, 500, (length,), generator=draw).tolist()) for length in (3, 17, 8)]
    requests = [Request(str(number), prompt) for number, prompt in enumerate(prompts)]
    gaps = []
    for completion in LocalEngine(model, batch_size=3, pad_token=0).generate(requests, Sampling(1.0, 1.0, 8, (), 3)):
        tokens = row_of(completion)
        with without_multi_token_prediction(model):
            logits_LV = model(tokens, torch.arange(tokens.shape[1])[None], None)[0].float()
        expected_LV = logits_LV.log_softmax(-1)[len(prompt_of(completion)) - 1 : -1]
        expected = expected_LV.gather(-1, torch.tensor(tokens_of(completion))[:, None])[:, 0]
        gaps.append(float((expected - logprobs_of(completion)).abs().max()))
    return max(gaps)


def main(folder: Path) -> None:
    with process_groups(PLATFORM, ParallelConfig(), seed=0, threads=1):
        gaps = {shape: gap(shape) for shape in ("tiny", "tiny_dense")}
    (folder / "gaps.json").write_text(json.dumps(gaps))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
