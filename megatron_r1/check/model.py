"""Checks of rotary positions, number formats, lengths, drafting, routing replay and the dispatcher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_r1.check.finding import Check, Finding, Job, passed, refusals, refused, unknown, warning
from megatron_r1.config.fp8 import LINEARS, ROWS
from megatron_r1.config.keys import reads
from megatron_r1.config.model import AttentionConfig
from megatron_r1.config.performance import refuse_on_cpu

HOPPER = ("H100", "H800", "H200")


def _rope(job: Job) -> Iterator[Finding]:
    rope, longest = job.config.model.rope, job.config.model.max_sequence_length
    if rope.factor == 1:
        return
    reach = int(rope.factor * rope.original_max_position)
    if longest > reach:
        yield refused(
            f"model.max_sequence_length={longest}: rotary positions reach {rope.original_max_position} x "
            f"model.rope.factor={rope.factor:g} = {reach}",
            f"take model.rope.factor={longest / rope.original_max_position:g}, or at most {reach} tokens",
        )
    if rope.scaling == "yarn" and rope.mscale != rope.mscale_all_dim:
        yield warning(
            f"model.rope.mscale={rope.mscale:g} and mscale_all_dim={rope.mscale_all_dim:g}: rotary and other parts of "
            "the attention logit get different temperatures",
            "DeepSeek's models have the same for both",
        )


def _fp8(job: Job) -> Iterator[Finding]:
    config, gpu = job.config, job.config.check.gpu
    if not config.fp8.enabled:
        return
    if gpu == "A100":
        yield refused("fp8.enabled=true: an A100 has no FP8", "take fp8=off, or H100 or newer GPUs")
    elif gpu and gpu not in HOPPER:
        text = f"fp8.enabled=true: whether Transformer Engine multiplies by 128 x 128 blocks on {gpu} is unverified"
        yield unknown(text, "try one step on the GPU")
    elif not gpu and job.on_gpus:
        yield unknown("fp8.enabled=true: the GPU is not known", "set check.gpu")
    for key, (kinds, width) in _fp8_widths(job).items():
        if width % ROWS and job.on_gpus and not {*kinds} <= {*config.fp8.exclude_modules}:
            yield refused(
                f"{key}: {width} wide on a rank, and Transformer Engine multiplies multiples of {ROWS} in FP8",
                f"take another parallel.tensor or parallel.expert_tensor, or fp8.exclude_modules=[{','.join(kinds)}]",
            )


def _fp8_widths(job: Job) -> dict[str, tuple[Sequence[str], int]]:
    """Key -> the kinds of linear layers that have this width on a rank, and the width; 0 where there are none."""
    model, degrees = job.config.model, job.config.parallel
    dense, experts = ([f"mlp.{part}linear_fc{number}" for number in (1, 2)] for part in ("", "experts."))
    widths = {
        "model.hidden_size": (LINEARS, model.hidden_size),
        "model.ffn_hidden_size": (dense, model.ffn_hidden_size // degrees.tensor),
        "model.moe.ffn_hidden_size": (
            experts, model.moe.ffn_hidden_size // degrees.expert_tensor * bool(model.moe.num_experts)
        ),
    }  # fmt: skip
    if isinstance(model.attention, AttentionConfig):
        for name, part in (("q_lora_rank", "q"), ("kv_lora_rank", "kv")):
            kinds = [f"self_attention.linear_{part}_{way}_proj" for way in ("down", "up")]
            widths[f"model.attention.{name}"] = (kinds, getattr(model.attention, name))
    return widths


def _lengths(job: Job) -> Iterator[Finding]:
    """The rules themselves are the configuration's."""
    rollout, longest = job.config.rollout, job.config.model.max_sequence_length
    if not reads(job.verb, "model"):
        return
    room, cache, key = longest - rollout.max_response_tokens, rollout.sglang.max_total_tokens, "max_total_tokens"
    if rollout.engine == "sglang" and 0 < cache < longest:
        found = refused if cache <= rollout.max_response_tokens else warning
        yield found(
            f"rollout.sglang.{key}={cache}: a response may have {rollout.max_response_tokens} tokens, all {longest}",
            f"take at least {longest}, or 0, which derives it from memory",
        )
    if room > 0:
        yield passed(f"{room} tokens for a prompt, {rollout.max_response_tokens} for a response")


def _drafting(job: Job) -> Iterator[Finding]:
    rollout, layers = job.config.rollout, job.config.model.mtp.num_layers
    if reads(job.verb, "model") and rollout.weight_sync.include_mtp and not layers:
        yield refused(
            "rollout.weight_sync.include_mtp=true: the model has no multi-token layers",
            "take false, or model.mtp.num_layers above 0 and weights that have them",
        )
    if rollout.sglang.server.speculative.method == "mtp" and layers and job.verb == "grpo":
        yield warning(
            "rollout.sglang.server.speculative.method=mtp: reinforcement learning does not train the layers that draft",
            "drafts are accepted less and less as the policy moves; watch the accepted length",
        )


def _replay(job: Job) -> Iterator[Finding]:
    if job.config.rl.routing_replay and job.config.rollout.sglang.started_elsewhere:
        yield unknown(
            "rl.routing_replay=true: whether servers started elsewhere return the chosen experts",
            "start them with --enable-return-routed-experts",
        )


def _dispatcher(job: Job) -> Iterator[Finding]:
    machine, degrees = job.config.check, job.config.parallel
    kind, key = job.config.performance.moe_token_dispatcher_type, "performance.moe_token_dispatcher_type"
    if job.config.platform == "cpu":
        yield from refusals(refuse_on_cpu, job.config.performance)
    elif kind in ("deepep", "hybridep") and machine.gpu == "A100":
        yield refused(f"{key}={kind}: its kernels need Hopper or newer GPUs", "take alltoall")
    elif not job.config.model.moe.num_experts:
        return
    elif kind in ("deepep", "hybridep") and degrees.expert * degrees.expert_tensor > machine.gpus_per_node:
        if machine.network == "ethernet":
            text = f"{key}={kind}: between nodes it needs InfiniBand or RoCE, and check.network=ethernet"
            yield refused(text, f"take alltoall, or parallel.expert of at most {machine.gpus_per_node}")
        elif not machine.network:
            yield unknown(f"{key}={kind}: between nodes it needs InfiniBand or RoCE", "set check.network")


CHECKS = (
    Check(11, "rotary extension against lengths", _rope, lambda job: reads(job.verb, "model.rope")),
    Check(12, "FP8 against GPU and widths", _fp8, lambda job: reads(job.verb, "fp8")),
    Check(22, "prompt and response against the context", _lengths, lambda job: reads(job.verb, "rollout.engine")),
    Check(26, "multi-token layers, drafting, sync", _drafting, lambda job: reads(job.verb, "rollout.engine")),
    Check(27, "routing replay against the servers", _replay, lambda job: job.verb == "grpo"),
    Check(28, "dispatcher against network", _dispatcher, lambda job: reads(job.verb, "performance")),
)
