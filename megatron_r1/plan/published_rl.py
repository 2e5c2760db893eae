"""Published steps of reinforcement learning: means, and upper bounds that nightly tests hold."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.published import NATURAL_IMBALANCE
from megatron_r1.plan.rollout import Responses, RolloutStep, ServerGpus, rl_step

SUMMARY = "NeMo RL, docs/about/performance-summary.md"
GATE = "NeMo RL, tests/test_suites/llm"
COMMON = (
    "init.from=x rl.updates_per_rollout=1 rl.old_logprobs_from=trainer rollout.placement=colocated "
    "rollout.weight_sync.method=ipc rollout.sglang.max_total_tokens=0 performance.overlap_grad_reduce=true"
)
V3 = (
    "model=v3_671b model.max_sequence_length=2048 rl.prompts_per_rollout=32 rollout.max_response_tokens=1300 "
    "rl.tokens_per_micro_batch=2048 parallel.expert=16 rollout.sglang.server.tensor_parallel=32"
)
QWEN = (
    "model=qwen3_30b_a3b model.max_sequence_length=4096 rl.prompts_per_rollout=64 rl.group_size=32 "
    "rollout.max_response_tokens=3800 rl.tokens_per_micro_batch=4096 parallel.expert=8 "
    "rollout.sglang.server.tensor_parallel=2"
)
MOONLIGHT = (
    "model=moonlight_16b model.max_sequence_length=8192 rl.prompts_per_rollout=32 rollout.max_response_tokens=8000 "
    "rl.tokens_per_micro_batch=8192 parallel.expert=4 parallel.pipeline=4 rollout.sglang.server.tensor_parallel=2"
)
LLAMA = (
    "model=llama3_2_1b model.max_sequence_length=512 rl.prompts_per_rollout=32 rollout.max_response_tokens=400 "
    "rl.tokens_per_micro_batch=2048"
)
QWEN_SMALL = (
    "model=qwen2_5_1_5b model.max_sequence_length=1024 rl.prompts_per_rollout=32 rollout.max_response_tokens=800 "
    "rl.tokens_per_micro_batch=2048"
)


@dataclass(frozen=True, slots=True)
class PublishedRollout:
    """One published step, trainer and engine on the same GPUs."""

    name: str
    gpu: str
    gpus: int
    tensor: int
    """GPUs of a server."""
    seconds: float
    layout: str
    responses: Responses
    source: str
    bound: bool = False
    """Whether `seconds` is an upper bound that a test holds, not a mean."""

    def predicted(self, constants: Constants) -> RolloutStep:
        """What the model says of it."""
        config = load("grpo", f"{COMMON} {self.layout}".split())
        moe = config.model.moe
        imbalance = NATURAL_IMBALANCE[moe.score_function] if moe.num_experts else 1.0
        job = TrainingJob(config, GPUS[self.gpu], self.gpus, imbalance)
        return rl_step(job, ServerGpus(self.gpus, self.tensor), constants, self.responses)


SHORT = Responses(512, 640, 1400, 150)
ROLLOUTS = (
    PublishedRollout("Qwen3-30B, 2,048 responses", "H100", 32, 2, 192, QWEN, Responses(2048, 3100, 3840, 200), SUMMARY),
    PublishedRollout("V3, 512 responses", "H100", 256, 32, 134, f"{V3} parallel.pipeline=16", SHORT, SUMMARY),
    PublishedRollout("V3, 512 responses", "H100", 512, 32, 111, f"{V3} parallel.pipeline=16", SHORT, SUMMARY),
    PublishedRollout("V3, 512 responses", "GB200", 128, 32, 108, f"{V3} parallel.pipeline=8", SHORT, SUMMARY),
    PublishedRollout("Moonlight", "H100", 32, 2, 70, MOONLIGHT, Responses(512, 1500, 8000, 200), GATE, bound=True),
    PublishedRollout("Llama-3.2-1B", "H100", 8, 1, 10.5, LLAMA, Responses(512, 300, 400, 100), GATE, bound=True),
    PublishedRollout("Qwen2.5-1.5B", "H100", 8, 1, 25, QWEN_SMALL, Responses(512, 500, 800, 100), GATE, bound=True),
    PublishedRollout("V3 on DAPO", "H100", 256, 32, 1000, f"{V3} parallel.pipeline=16", SHORT, GATE, bound=True),
)
"""The lengths of Moonlight's, Llama's and Qwen2.5's responses are not published: as assumed here."""
