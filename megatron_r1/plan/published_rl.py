"""Published steps of reinforcement learning: means, some with their parts, and upper bounds that nightly tests hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.decode import ServerGpus
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.published import DEEPEP, FP8, NATURAL_IMBALANCE, recompute
from megatron_r1.plan.responses import Responses
from megatron_r1.plan.rollout import RolloutStep, rl_step
from megatron_r1.plan.serving import FIRST_FIT, NO_PACKING, RolloutStack, ServingConstants

NEMO = "NeMo RL {}, docs/about/performance-summary.md; recipes of that release"
BLOG = "NeMo RL 0.3, blog of 2025-07-21, as quoted in its issue 959"
GATE = "NeMo RL 0.6, tests/test_suites/llm"
VERL = "verl, docs/perf/dpsk.md and its script"
H20 = replace(GPUS["H100"], bf16=148e12, fp8=296e12, watts=400, memory_gb=103, memory_bandwidth=4e12,
              source="NVIDIA H20, as users give the vendor's figures")  # fmt: skip

VLLM = RolloutStack(
    "NeMo RL with vLLM",
    hides_host=False,
    pageable_bytes=6e9,
    gathers_model=True,
    packing=FIRST_FIT,
    padded=True,
    in_flight=True,
    loss_seconds=0.020,
    score_seconds=0.003,
    response_seconds=0.0015,
)
"""Read off two steps whose parts are published (Llama 3.1 8B and 70B, `BLOG`): the host's seconds for the loss of a
response, for its log-probabilities and for the rest; and the rate at which optimizer states move, which that software
copies to pageable memory. So these two rows do not test those four figures."""

COMMON = (
    "init.from=x rl.old_logprobs_from=trainer rl.kl_coefficient=0.01 rollout.sglang.max_total_tokens=0 "
    "performance.overlap_grad_reduce=true"
)
ALL_RECOMPUTED = recompute("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
QWEN3_32B = (
    "model=qwen2_5_32b model.num_attention_heads=64 model.ffn_hidden_size=25600 model.vocab_size=151936 "
    "model.attention.qkv_bias=false model.attention.qk_norm=true"
)


@dataclass(frozen=True, slots=True)
class PublishedRollout:
    """One published step."""

    name: str
    gpu: str
    trainers: int
    """GPUs of the trainer."""
    servers: int
    """GPUs of servers of their own; 0 where they share the trainer's."""
    tensor: int
    """GPUs of a server."""
    seconds: float
    model: str
    """Overrides of the recipe `grpo`: model, batch, kernels; the tokens of a micro-batch come first."""
    degrees: tuple[int, int, int, int]
    """Tensor-, context-, expert- and pipeline-parallel ranks of the trainer."""
    responses: Responses
    source: str
    memory: float = 0.6
    """Share of a GPU's memory for weights and cache of the server."""
    stack: RolloutStack = VLLM
    parts: dict[str, float] = field(default_factory=dict, hash=False)
    """Phase -> published seconds, where the source states them: rollout, logprobs, update, or handover (weight sync and
    copies to host memory)."""
    fit: bool = True
    """Whether constants are fitted to it."""
    missing: str = ""
    """What the model does not have."""
    assumed: str = "prompts of 110 tokens"
    """Inputs that the source does not state, beside the spread of lengths (responses.SPREAD)."""

    @property
    def gpus(self) -> int:
        return self.trainers + self.servers

    def job(self) -> TrainingJob:
        """Its trainer."""
        return _job(self)

    @property
    def engines(self) -> ServerGpus:
        return ServerGpus(self.servers or self.trainers, self.tensor)

    def predicted(self, constants: Constants, serving: ServingConstants | None = None) -> RolloutStep:
        """What the model says of it."""
        return rl_step(self.job(), self.engines, constants, self.responses, serving, self.stack)


@cache
def _config(model: str) -> RunConfig:
    budget, *overrides = model.split()
    size = f"rl.tokens_per_micro_batch={budget} model.max_sequence_length={int(budget) + 1}"
    return load("grpo", [*COMMON.split(), *size.split(), "rollout.max_response_tokens=64", *overrides])


@cache
def _job(row: PublishedRollout) -> TrainingJob:
    config = _config(row.model)
    tensor, context, expert, pipeline = row.degrees
    server = replace(config.rollout.sglang.server, tensor_parallel=row.tensor, memory_fraction=row.memory)
    rollout = replace(
        config.rollout,
        placement="separate" if row.servers else "colocated",
        max_staleness=1 if row.servers else 0,
        weight_sync=replace(config.rollout.weight_sync, method="group" if row.servers else "ipc"),
        sglang=replace(config.rollout.sglang, server=server),
    )
    parallel = replace(config.parallel, tensor=tensor, context=context, expert=expert, pipeline=pipeline)
    moe = config.model.moe
    imbalance = NATURAL_IMBALANCE[moe.score_function] if moe.num_experts else 1.0
    gpu = H20 if row.gpu == "H20" else GPUS[row.gpu]
    return TrainingJob(replace(config, rollout=rollout, parallel=parallel), gpu, row.trainers, imbalance)


def _batch(prompts: int, group: int, updates: int) -> str:
    return f"rl.prompts_per_rollout={prompts} rl.group_size={group} rl.updates_per_rollout={updates}"


def _v3(mean: float) -> Responses:
    return Responses(512, mean, 1426, 110)


def _qwen_235b(mean: float) -> Responses:
    return Responses(512, mean, 8080, 110)


def _of_2048(mean: float, prompt: float = 110) -> Responses:
    return Responses(2048, mean, 3970, prompt)


V3 = f"1536 model=v3_671b {_batch(32, 16, 1)} {ALL_RECOMPUTED}"
QWEN_235B = f"8192 model=qwen3_235b_a22b {_batch(16, 32, 1)} {ALL_RECOMPUTED}"
QWEN_30B = f"4096 model=qwen3_30b_a3b {_batch(64, 32, 4)}"
QWEN_32B = f"4096 {QWEN3_32B} {_batch(64, 32, 4)}"
LLAMA_8B = f"4096 model=llama3_1_8b {_batch(64, 32, 4)}"
LLAMA_8B_SAVING = f"{LLAMA_8B} {ALL_RECOMPUTED}"
LLAMA_70B = f"4096 model=llama3_3_70b {_batch(64, 32, 4)}"
V3_LONG = f"11680 model=v3_671b {_batch(96, 8, 3)} {ALL_RECOMPUTED} rollout.sglang.server.cuda_graph=false"
NEW, OLD = NEMO.format("0.6"), NEMO.format("0.5")
TWO, FOUR = replace(VLLM, scored_together=2), replace(VLLM, scored_together=4)
Row = PublishedRollout

ROLLOUTS = (
    Row("V3", "H100", 256, 0, 32, 134, V3, (1, 1, 16, 16), _v3(701), NEW),
    Row("V3", "H100", 512, 0, 32, 111, V3, (1, 1, 32, 16), _v3(697), NEW),
    Row("V3, 1 ahead", "H100", 256, 256, 32, 64.1, V3, (1, 1, 16, 16), _v3(710), NEW, 0.8, TWO),
    Row("V3, later release", "H100", 256, 0, 32, 121.2, V3, (1, 1, 16, 16), _v3(744), "NeMo RL, pull request 2779",
        parts={"rollout": 57.4}),
    Row("V3", "GB200", 128, 0, 32, 108, V3, (1, 1, 16, 8), _v3(711), NEW, 0.3),
    Row("V3", "GB200", 256, 0, 32, 98.7, V3, (1, 1, 32, 8), _v3(700), NEW, 0.3),
    Row("V3, 1 ahead", "GB200", 128, 128, 16, 61.7, V3, (1, 1, 16, 8), _v3(708), NEW, 0.8, TWO),
    Row("Qwen3-235B", "H100", 128, 0, 16, 395, QWEN_235B, (2, 2, 16, 8), _qwen_235b(5698), NEW),
    Row("Qwen3-235B", "H100", 256, 0, 16, 312, QWEN_235B, (2, 2, 16, 8), _qwen_235b(5713), NEW),
    Row("Qwen3-235B, 1 ahead", "H100", 128, 128, 8, 231, QWEN_235B, (4, 1, 16, 8), _qwen_235b(5721), NEW, 0.8),
    Row("Qwen3-235B", "GB200", 64, 0, 8, 286, QWEN_235B, (2, 2, 16, 4), _qwen_235b(5709), NEW, 0.4),
    Row("Qwen3-235B", "GB200", 128, 0, 8, 345, QWEN_235B, (2, 2, 16, 4), _qwen_235b(5693), NEW),
    Row("Qwen3-235B, 1 ahead", "GB200", 64, 64, 8, 278, QWEN_235B, (4, 1, 16, 4), _qwen_235b(5705), NEW, 0.8),
    Row("Qwen3-30B", "H100", 32, 0, 2, 192, QWEN_30B, (1, 1, 8, 1), _of_2048(3203), NEW, stack=FOUR),
    Row("Qwen3-30B, 1 ahead", "H100", 16, 16, 2, 152, QWEN_30B, (1, 1, 8, 2), _of_2048(3201), NEW, 0.8, FOUR),
    Row("Qwen3-30B", "GB200", 16, 0, 1, 221, QWEN_30B, (1, 1, 16, 1), _of_2048(3199), NEW, stack=TWO),
    Row("Qwen3-30B, 1 ahead", "GB200", 8, 8, 1, 301, QWEN_30B, (1, 1, 8, 1), _of_2048(3197), NEW, 0.8, TWO),
    Row("Qwen3-32B", "H100", 32, 0, 4, 376, QWEN_32B, (4, 1, 1, 4), _of_2048(3251), OLD),
    Row("Qwen3-32B, 1 ahead", "H100", 32, 32, 4, 200, QWEN_32B, (4, 1, 1, 4), _of_2048(3252), OLD, 0.8),
    Row("Qwen3-32B", "GB200", 16, 0, 1, 381, QWEN_32B, (2, 1, 1, 1), _of_2048(3253), OLD),
    Row("Qwen3-32B, 1 ahead", "GB200", 16, 16, 1, 210, QWEN_32B, (2, 1, 1, 1), _of_2048(3258), OLD, 0.8),
    Row("Llama 3.1 8B", "H100", 16, 0, 1, 92.8, LLAMA_8B_SAVING, (1, 1, 1, 2), _of_2048(1019, 127), OLD, stack=TWO),
    Row("Llama 3.1 8B, 1 ahead", "H100", 8, 8, 1, 64.8, LLAMA_8B_SAVING, (1, 1, 1, 1), _of_2048(1123, 127), OLD, 0.8,
        TWO),
    Row("Llama 3.1 8B", "GB200", 8, 0, 1, 91.0, LLAMA_8B_SAVING, (1, 1, 1, 1), _of_2048(1066, 127), OLD, stack=TWO),
    Row("Llama 3.1 8B, 1 ahead", "GB200", 4, 4, 1, 71.1, LLAMA_8B_SAVING, (1, 1, 1, 1), _of_2048(1107, 127), OLD, 0.8,
        TWO),
    Row("Llama 3.1 8B", "H100", 8, 0, 1, 112, LLAMA_8B, (1, 1, 1, 2), _of_2048(795), BLOG, stack=FOUR,
        parts={"rollout": 58, "logprobs": 18, "update": 28, "handover": 5}),
    Row("Llama 3.1 70B", "H100", 64, 0, 4, 147, LLAMA_70B, (4, 1, 1, 4), _of_2048(398), BLOG, stack=FOUR,
        parts={"rollout": 84, "logprobs": 18, "update": 28, "handover": 14}),
    Row("V3, DAPO-Math", "H20", 96, 0, 32, 1700, V3_LONG, (8, 1, 8, 12), Responses(768, 1960, 9632, 150), VERL,
        parts={"rollout": 1050}, fit=False, assumed="prompts of 150 tokens",
        missing="Adam on the host's processors, resharding of 2025"),
)  # fmt: skip
"""Means. Where tokens/s/GPU are published beside the responses' mean length, prompts are what is left."""

MATH = "prompts of 110 tokens, responses of {}"
MOONLIGHT = f"8192 model=moonlight_16b {_batch(32, 16, 1)}"
MOONLIGHT_FP8 = f"{MOONLIGHT} {FP8} rollout.sglang.server.quantization=fp8"
DAPO = f"16384 model=v3_671b {_batch(32, 16, 1)} {ALL_RECOMPUTED}"
LLAMA_1B, QWEN_1B = (f"2048 model={name} {_batch(32, 16, 1)}" for name in ("llama3_2_1b", "qwen2_5_1_5b"))
SHORT, LONG = Responses(512, 300, 8080, 110), Responses(512, 2000, 16000, 110)
DEEPEP_RANKS = f"{DEEPEP} parallel.expert=2"  # the dispatcher needs experts on several ranks, here those of `degrees`
ALONE = replace(VLLM, packing=NO_PACKING)
BOUNDS = (
    Row("Moonlight", "H100", 32, 0, 1, 70, f"{MOONLIGHT} {DEEPEP_RANKS}", (1, 1, 4, 4), SHORT, GATE, stack=ALONE,
        assumed=MATH.format(300)),
    Row("Moonlight FP8", "H100", 32, 0, 1, 70, MOONLIGHT_FP8, (1, 1, 4, 4), SHORT, GATE, 0.5,
        assumed=MATH.format(300)),
    Row("Moonlight", "GB200", 16, 0, 1, 80, MOONLIGHT, (1, 1, 2, 2), SHORT, GATE, stack=ALONE,
        assumed=MATH.format(300)),
    Row("Llama 3.2 1B", "H100", 8, 0, 1, 10.5, LLAMA_1B, (1, 1, 1, 1), Responses(512, 250, 400, 110), GATE,
        assumed=MATH.format(250)),
    Row("Qwen2.5 1.5B", "H100", 8, 0, 1, 25, QWEN_1B, (1, 1, 1, 1), Responses(512, 300, 400, 110), GATE,
        assumed=MATH.format(300)),
    Row("V3, DAPO-Math", "H100", 256, 0, 32, 1000, f"{DAPO} {DEEPEP_RANKS}", (8, 4, 32, 8), LONG, GATE,
        assumed=MATH.format(2000)),
    Row("V3, DAPO-Math", "GB200", 128, 0, 32, 1000, DAPO, (4, 4, 16, 8), LONG, GATE, 0.3, assumed=MATH.format(2000)),
    Row("Qwen3-32B", "H100", 32, 0, 4, 400, QWEN_32B, (4, 1, 1, 4), _of_2048(3251), GATE, stack=FOUR,
        assumed="lengths as those of release 0.5"),
    Row("Qwen3-32B", "GB200", 16, 0, 2, 400, QWEN_32B, (2, 1, 1, 4), _of_2048(3253), GATE, stack=FOUR,
        assumed="lengths as those of release 0.5"),
)  # fmt: skip
"""Upper bounds that nightly tests hold, not means; they say little where lengths are assumed."""
