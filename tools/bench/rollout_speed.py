"""Rollouts by our engines beside transformers.generate, on this machine's CPU.

    python tools/bench/rollout_speed.py --engine local --sequences 256
    python tools/bench/rollout_speed.py --engine sglang --sequences 64

The work is shaped like GRPO's: groups of 16 responses to one prompt, prompts of drawn lengths, responses that end early
by any of several stop tokens, the log-prob of every token returned; same weights (through our Hugging Face export),
fp32. Engines draw; transformers is then made to draw the same tokens, so that its responses end where the engine's did,
and its log-probs of them are compared. Both sides first try their settings: threads (SGLang has its own), and for
transformers the cache and the implementation of experts. Speeds are of response tokens. Beside SGLang by our engine,
"raw" is one plain HTTP call with the same requests, parsed and no more. Its cache of prompts is empty before each call,
as it is after new weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from megatron_r1.platform import select

PLATFORM = select("cpu")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_r1.config.data import DataConfig  # noqa: E402
from megatron_r1.config.load import load  # noqa: E402
from megatron_r1.config.model import ModelConfig  # noqa: E402
from megatron_r1.config.parallel import ParallelConfig  # noqa: E402
from megatron_r1.config.rollout import RolloutConfig  # noqa: E402
from megatron_r1.config.sglang import SGLangConfig  # noqa: E402
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer  # noqa: E402
from megatron_r1.model.build import build_model, native_tensors  # noqa: E402
from megatron_r1.parallel.mesh import process_groups  # noqa: E402
from megatron_r1.rollout.engine import Completion, Request, RolloutEngine, Sampling, require_completions  # noqa: E402
from megatron_r1.rollout.factory import sglang_engine  # noqa: E402
from megatron_r1.rollout.in_process import LocalEngine  # noqa: E402
from megatron_r1.rollout.sglang.engine import SGLangEngine  # noqa: E402
from tools.bench.comparison import alternate, describe  # noqa: E402
from tools.bench.twin import EXPERTS, expert_choices, export, transformers_model, use_experts  # noqa: E402

PAD = 0
GAP = 1e-4
"""Largest difference of log-probs of the two sides, in nats."""


@dataclass(frozen=True)
class Work:
    """What both sides do."""

    requests: list[Request]
    sampling: Sampling


@dataclass(frozen=True)
class Setting:
    """How transformers runs."""

    threads: int
    cache: str
    experts: str

    def __str__(self) -> str:
        return f"{self.threads} threads, {self.cache} cache, {self.experts} experts"


def drawn_work(given: argparse.Namespace, vocabulary: int) -> Work:
    draw = torch.Generator().manual_seed(given.seed)
    first = 1 + PAD
    groups = given.sequences // given.group
    lengths = torch.randint(given.prompt_tokens // 3, given.prompt_tokens + 1, (groups,), generator=draw).tolist()
    prompts = [tuple(torch.randint(first, vocabulary, (n,), generator=draw).tolist()) for n in lengths]
    requests = [Request(str(number), prompts[number // given.group]) for number in range(groups * given.group)]
    # Where probabilities are nearly even, a response has about `mean_tokens` tokens before one of these comes.
    stops = (torch.randperm(vocabulary - first, generator=draw)[: vocabulary // given.mean_tokens] + first).tolist()
    return Work(requests, Sampling(1.0, 1.0, given.max_tokens, tuple(stops), given.seed))


class Transformers:
    """transformers.generate, which draws the tokens of given responses."""

    def __init__(self, model: Any, work: Work):
        self._model, self._work = model, work
        self.setting = Setting(1, "dynamic", "eager")

    def seconds(self, completions: Sequence[Completion]) -> float:
        """Generate; checks tokens and log-probs afterwards."""
        from transformers import LogitsProcessorList

        torch.set_num_threads(self.setting.threads)
        use_experts(self._model, self.setting.experts)
        prompts = [one.response.prompt_tokens.tolist() for one in completions]
        longest = max(map(len, prompts))
        prompts_BL = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
        lengths_B1 = torch.tensor([len(prompt) for prompt in prompts])[:, None]
        forced = Forced(padded([one.response.tokens.tolist() for one in completions]), longest)
        started = time.perf_counter()
        with torch.inference_mode():
            found_BL = self._model.generate(
                input_ids=prompts_BL,
                attention_mask=(torch.arange(longest) >= longest - lengths_B1).long(),
                max_new_tokens=self._work.sampling.max_tokens,
                do_sample=True,
                eos_token_id=list(self._work.sampling.stop_tokens),
                pad_token_id=PAD,
                cache_implementation=self.setting.cache,
                logits_processor=LogitsProcessorList([forced]),
            )
        seconds = time.perf_counter() - started
        check(completions, found_BL[:, longest:], torch.stack(forced.logprobs, 1))
        return seconds


class Forced:
    """A logits processor: notes the log-prob of each given token, and leaves generate no other to draw."""

    def __init__(self, tokens_BT: Tensor, prompt_tokens: int):
        self._tokens_BT, self._prompt_tokens = tokens_BT, prompt_tokens
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._prompt_tokens
        token_B1 = self._tokens_BT[:, step : step + 1]
        self.logprobs.append(scores.log_softmax(-1).gather(1, token_B1)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_B1, 0.0)


def padded(responses: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, responses))
    return torch.tensor([[*tokens, *[PAD] * (longest - len(tokens))] for tokens in responses])


def check(completions: Sequence[Completion], tokens_BT: Tensor, logprobs_BT: Tensor) -> None:
    """
    Raises:
        AssertionError: the two sides did not generate the same, or not with the same log-probs.
    """
    worst = 0.0
    for one, tokens, logprobs in zip(completions, tokens_BT.tolist(), logprobs_BT, strict=True):
        length = len(one.response.tokens)
        assert tokens[:length] == one.response.tokens.tolist()
        worst = max(worst, float((logprobs[:length] - torch.from_numpy(one.response.logprobs)).abs().max()))
    assert worst < GAP, f"log-probs differ by {worst:.1e}"


@contextmanager
def engine_of(given: argparse.Namespace, model: Any, shape: ModelConfig, folder: Path) -> Iterator[RolloutEngine]:
    if given.engine == "local":
        yield LocalEngine(model, given.sequences, PAD)
        return
    train_tokenizer(DataConfig(num_documents=2000)).save(folder / "tokenizer")
    room = 2 * given.sequences * (given.prompt_tokens + given.max_tokens)
    rollout = RolloutConfig(sglang=SGLangConfig(max_running_requests=given.sequences, max_total_tokens=room))
    files = folder / "tokenizer", folder / "logs", "cpu"
    with sglang_engine(rollout, shape, lambda: native_tensors(model), *files) as (engine, sync):
        sync.push("0")
        yield engine


def fastest[S](settings: Sequence[S], use: Callable[[S], None], way: Callable[[], float], title: str) -> S:
    """The setting with the least seconds, in use from now on."""

    def measured(setting: S) -> Callable[[], float]:
        def run() -> float:
            use(setting)
            return way()

        return run

    found = alternate({str(one): measured(one) for one in settings}, 1, warm_up=0)
    best = min(settings, key=lambda one: min(found[str(one)]))
    print(f"{title}: {best}  (tried {', '.join(f'{name}: {1 / min(s):.0f}' for name, s in found.items())} tokens/s)")
    use(best)
    return best


def measure(given: argparse.Namespace, folder: Path) -> None:
    shape = load("pretrain", [f"model={given.model}", "model.dtype=fp32", "model.mtp.num_layers=0", *given.set]).model
    work = drawn_work(given, shape.vocab_size)
    model = build_model(shape, ParallelConfig(), PLATFORM, given.seed)
    theirs = Transformers(transformers_model(export(model, shape, folder / "hf")), work)
    with engine_of(given, model, shape, folder) as engine:
        latest: list[list[Completion]] = []
        threads = [1]

        def ours_per_token() -> float:
            torch.set_num_threads(threads[0])
            sampling = replace(work.sampling, seed=work.sampling.seed + len(latest))
            if isinstance(engine, SGLangEngine):
                call(engine, "/flush_cache?timeout=10", {}, admin=True)
            started = time.perf_counter()
            latest.append(require_completions(engine.generate(work.requests, sampling)))
            return (time.perf_counter() - started) / tokens_of(latest[-1])

        def theirs_per_token() -> float:
            return theirs.seconds(latest[-1]) / tokens_of(latest[-1])

        def use(setting: Setting) -> None:
            theirs.setting = setting

        ours_per_token()
        print(f"{len(work.requests)} responses of {lengths_of(latest[-1])} tokens")
        if given.engine == "local":
            fastest(given.threads, lambda one: threads.__setitem__(0, one), ours_per_token, f"{given.engine} threads")
        tried = product(given.threads, given.caches, [one for one in expert_choices(shape) if one in given.experts])
        fastest([Setting(*one) for one in tried], use, theirs_per_token, "transformers")
        ways = {given.engine: ours_per_token, "transformers": theirs_per_token}
        if isinstance(engine, SGLangEngine):
            ways["raw"] = partial(raw_per_token, engine, work)
        found = alternate(ways, given.rounds)
        if "raw" in found:
            print(describe({name: found[name] for name in (given.engine, "raw")}, base="raw", work=1, unit="tokens"))
    print(f"every log-prob of the two within {GAP}; seconds are of a response token:")
    print(describe(found, base="transformers", work=1, unit="tokens"))


def raw_per_token(engine: SGLangEngine, work: Work) -> float:
    """Seconds of a token of one call to the server, without our client."""
    call(engine, "/flush_cache?timeout=10", {}, admin=True)
    sampling = work.sampling
    body = {
        "input_ids": [request.prompt_tokens for request in work.requests],
        "sampling_params": {
            "temperature": sampling.temperature,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": sampling.stop_tokens,
        },
        "return_logprob": True,
    }
    started = time.perf_counter()
    replies = json.loads(call(engine, "/generate", body))
    seconds, tokens = time.perf_counter() - started, sum(int(one["meta_info"]["completion_tokens"]) for one in replies)
    return seconds / tokens


def call(engine: SGLangEngine, path: str, body: object, admin: bool = False) -> bytes:
    """The reply of the engine's first server."""
    server = engine.endpoints[0]
    headers = {
        "Authorization": f"Bearer {server.admin_key if admin else server.api_key}",
        "Content-Type": "application/json",
    }
    asked = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(asked) as reply:
        found: bytes = reply.read()
    return found


def tokens_of(completions: Sequence[Completion]) -> int:
    return sum(len(one.response.tokens) for one in completions)


def lengths_of(completions: Sequence[Completion]) -> str:
    lengths = [len(one.response.tokens) for one in completions]
    return f"{min(lengths)} to {max(lengths)}, {statistics.mean(lengths):.0f} on average,"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["local", "sglang"], default="local")
    parser.add_argument("--model", default="tiny", help="a preset in configs/model")
    parser.add_argument("--set", nargs="*", default=["model.init_std=0.08"], help="other keys of the model")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--group", type=int, default=16, help="sequences that share a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=72, help="of the longest prompt; the shortest has a third")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a response")
    parser.add_argument("--mean-tokens", type=int, default=48, help="of a response, about")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads that are tried")
    parser.add_argument("--caches", nargs="+", default=["dynamic", "static"], help="of transformers, that are tried")
    parser.add_argument("--experts", nargs="+", default=EXPERTS, help="transformers' implementations that are tried")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with process_groups(PLATFORM, ParallelConfig(), seed=0, threads=1), tempfile.TemporaryDirectory() as folder:
        measure(given, Path(folder))


if __name__ == "__main__":
    main()
