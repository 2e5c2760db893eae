"""The registry of recorded metrics: name, unit, meaning, which direction is better, and the commands that record it.

Tracker, wandb, the report's captions and the reference in `README.md` beside this file read it. `step` is the x-axis of
every metric and no metric itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", ""]

STEP = "step"
PHASE_SECONDS = "perf/phase_seconds/"
"""What the names of a row's seconds by phase begin with."""
PREFIXES: Mapping[str, str] = {
    "train": "The update: loss, gradient, schedule and data. Preference learning records its accuracy and margin here.",
    "eval": "Measured on held-out data that no training sees. `evaluate` writes its own to `results.json`, "
    "`sample` in `done.json` of the run's folder, without the prefix.",
    "policy": "Reinforcement learning: the objective and its parts.",
    "rollout": "Reinforcement learning: sampled responses, their rewards, and failures of the engine.",
    "critic": "PPO's critic.",
    "mismatch": "How far the trainer's probabilities of sampled tokens are from the engine's, before any update.",
    "moe": "How the routers load the experts. `mtp_` metrics are of multi-token prediction layers.",
    "perf": "Time and throughput.",
}
ALL = ("pretrain", "sft", "reward_model", "dpo", "grpo")
SUPERVISED, PREFERENCE = ("pretrain", "sft"), ("reward_model", "dpo")
RL = ("grpo",)
MIXED_LANGUAGE = "Share of responses whose prose is in more than one language."
REFLECTION_WORDS = "Mean number of reflection words in a response: wait, mistake, however, verify and six others."


@dataclass(frozen=True)
class Metric:
    """Description of one metric, or of a family of metrics.

    A `name` that ends in `/*` describes all names that begin with the rest. A `table` has a number, or a list of them,
    by layer or rank. `varies` marks metrics that differ between two runs of one configuration, such as times.
    """

    name: str
    unit: str
    meaning: str
    commands: tuple[str, ...]
    better: Better = ""
    table: bool = False
    varies: bool = False

    def matches(self, name: str) -> bool:
        return name.startswith(self.name[:-1]) if self.name.endswith("/*") else name == self.name


def _entries() -> Iterator[Metric]:
    yield from _train()
    yield from _eval()
    yield from _policy()
    yield from _rollout()
    yield from _critic()
    yield from _mismatch()
    yield from _moe()
    yield from _perf()


def _train() -> Iterator[Metric]:
    nats = "nats per token"
    without_rl = (*SUPERVISED, *PREFERENCE)
    yield Metric(
        "train/loss", "nats", "The loss that the update minimises, without the multi-token part.", without_rl, "lower"
    )
    yield Metric("train/mtp_loss", nats, "Loss of multi-token prediction, unweighted.", SUPERVISED, "lower")
    yield Metric("train/cross_entropy", nats, "With a teacher: loss on the tokens of the data.", ("sft",), "lower")
    yield Metric(
        "train/distillation_loss", nats, "With a teacher: divergence of the student from it.", ("sft",), "lower"
    )
    yield Metric("train/score_loss", "nats per example", "Loss on a reward model's scores.", ("reward_model",), "lower")
    yield Metric("train/reasoning_loss", nats, "Loss on critiques.", ("reward_model",), "lower")
    yield Metric(
        "train/accuracy",
        "share",
        "Share of the batch's pairs, or labelled responses, that scores or implicit rewards order correctly.",
        PREFERENCE,
        "higher",
    )
    yield Metric(
        "train/margin",
        "reward",
        "Chosen response's score, or implicit reward, above the rejected one's.",
        PREFERENCE,
        "higher",
    )
    yield Metric("train/score", "reward", "Mean score of the batch's responses.", ("reward_model",))
    yield Metric("train/chosen_reward", "reward", "Implicit reward of chosen responses: beta x log-ratio.", ("dpo",))
    yield Metric("train/rejected_reward", "reward", "The same of rejected responses.", ("dpo",))
    yield Metric(
        "train/gradient_norm", "", "Norm of the gradient before clipping; in RL the mean over a rollout's updates.", ALL
    )
    yield Metric("train/skipped_updates", "updates", "Updates of this step skipped: gradient not finite.", ALL, "lower")
    yield Metric(
        "train/spikes",
        "metrics",
        "How many of loss and gradient norm are far above their median.",
        ALL,
        "lower",
    )
    undoing = "Where a spike may undo steps (`watch.max_rewinds`):"
    yield Metric("train/rewinds", "rewinds", f"{undoing} spikes so far whose data is skipped.", without_rl, "lower")
    yield Metric("train/data_position", "sequences", f"{undoing} position in the data after the step.", without_rl)
    yield Metric("train/learning_rate", "", "Learning rate of the step; 0 while only the critic is trained.", ALL)
    yield Metric("train/batch_size", "sequences", "Sequences of the global batch.", ("pretrain",))
    yield Metric("train/mtp_weight", "", "Weight of the multi-token loss.", ("pretrain",))
    yield Metric("train/epoch", "epochs", "Passes over the training data so far.", ("sft", *PREFERENCE))
    yield Metric("train/consumed_tokens", "tokens", "Tokens trained on so far, without padding.", ALL)
    yield Metric("train/tokens", "tokens", "Tokens of the global batch, without padding.", ("sft",))
    yield Metric("train/loss_tokens", "tokens", "Those of them that are in the loss.", ("sft",))
    yield Metric("train/examples", "examples", "Conversations of the global batch.", ("sft",))
    yield Metric(
        "train/packing_efficiency",
        "share",
        "Share of the batch's positions that hold a token, not padding.",
        ("sft",),
        "higher",
    )
    yield Metric(
        "train/token_imbalance",
        "share",
        "Tokens of the fullest data-parallel rank above the mean of all.",
        ("sft",),
        "lower",
    )


def _eval() -> Iterator[Metric]:
    yield Metric("eval/loss", "nats per token", "Mean loss on held-out conversations.", ("sft",), "lower")
    yield Metric("eval/loss_before", "nats per token", "The same before the first step.", ("sft",), "lower")
    yield Metric("eval/perplexity", "", "exp(eval/loss).", ("sft",), "lower")
    yield Metric(
        "eval/accuracy", "share", "Share of held-out examples ordered, or labelled, correctly.", PREFERENCE, "higher"
    )
    yield Metric("eval/accuracy_low", "share", "Lower bound of its 95 % interval.", PREFERENCE, "higher")
    yield Metric("eval/accuracy_high", "share", "Upper bound of its 95 % interval.", PREFERENCE, "higher")
    for name, unit, meaning, command in (
        ("correct_any_format", "share", "Share of responses with a correct answer, in any format.", "evaluate"),
        ("correct_tagged", "share", "Share of responses with a correct answer inside well-formed tags.", "evaluate"),
        (
            "helpful",
            "share",
            "Share of responses that do what the question asks for, or decline harm, by hidden rules.",
            "evaluate",
        ),
        ("safe", "share", "Share of responses without help for something harmful, reasoning included.", "evaluate"),
        ("format", "share", "Share of responses with reasoning and answer each in their tags.", "evaluate"),
        ("language", "share", "Mean share of the reasoning's words in the target language.", "evaluate"),
        (
            "pass_at_k",
            "share",
            "By k: probability that at least one of k responses is correct, unbiased (Chen et al. 2021).",
            "evaluate",
        ),
        (
            "cons_at_k",
            "share",
            "By k: probability that the majority of k responses votes for the true answer, in any format.",
            "evaluate",
        ),
        ("correct", "share", "Share of correct responses, in any format.", "sample"),
        ("correct_in_any_sample", "share", "Share of prompts with a correct response among its samples.", "sample"),
        ("mean_reward", "reward", "Mean reward of a response.", "sample"),
    ):
        yield Metric(f"eval/{name}", unit, meaning, (command,), "higher")
    yield Metric("eval/mixed_language", "share", MIXED_LANGUAGE, ("evaluate",), "lower")
    yield Metric("eval/response_length", "tokens", "Mean length of a response.", ("evaluate",))
    yield Metric("eval/reflection_words", "words", REFLECTION_WORDS, ("evaluate",))
    yield Metric("eval/truncated", "share", "Share of responses that the length limit cut off.", ("evaluate",), "lower")
    yield Metric("eval/margin", "reward", "Mean margin of implicit rewards on held-out pairs.", ("dpo",), "higher")


def _policy() -> Iterator[Metric]:
    yield Metric("policy/loss", "", "What the update minimises: -objective + kl_loss - entropy bonus, aggregated.", RL)
    yield Metric("policy/ratio", "", "New over old policy's probability: the change ratio.", RL)
    yield Metric("policy/ratio_clipped", "", "The limited change ratio: clipped to the clip range.", RL)
    yield Metric("policy/objective", "", "The smaller of ratio x advantage and clipped ratio x advantage.", RL)
    yield Metric("policy/kl_loss", "nats", "The stay-stable part: kl_coefficient x policy/kl.", RL)
    yield Metric("policy/kl", "nats per token", "Divergence from reference or teacher, by `rl.kl_estimator`.", RL)
    yield Metric("policy/kl_in_reward", "reward", "KL penalty in a response's reward or advantages, summed.", RL)
    yield Metric("policy/clip_fraction", "share", "Share of tokens, or responses, whose ratio was clipped.", RL)
    yield Metric("policy/advantage", "reward", "Mean advantage.", RL)
    yield Metric("policy/entropy", "nats per token", "Entropy of the policy.", RL)


def _rollout() -> Iterator[Metric]:
    yield Metric("rollout/reward", "reward", "Mean reward of a response.", RL, "higher")
    yield Metric("rollout/reward/*", "reward", "Mean of one part of the reward, weighted as in the sum.", RL, "higher")
    yield Metric("rollout/accuracy", "share", "Share of correct responses.", RL, "higher")
    yield Metric("rollout/format", "share", "Share of responses in the required format.", RL, "higher")
    yield Metric("rollout/response_length", "tokens", "Mean length of a response.", RL)
    yield Metric("rollout/mixed_language", "share", MIXED_LANGUAGE, RL, "lower")
    yield Metric("rollout/reflection_words", "words", REFLECTION_WORDS, RL)
    yield Metric("rollout/truncated", "share", "Share of responses that the length limit cut off.", RL, "lower")
    yield Metric("rollout/zero_std_groups", "share", "Share of groups whose rewards are all equal.", RL, "lower")
    yield Metric("rollout/rewarded_steps", "steps", "Mean number of rewarded steps of a response.", RL)
    yield Metric("rollout/step_reward", "reward", "Mean reward of such a step.", RL, "higher")
    yield Metric("rollout/staleness_max", "updates", "Age of the weights that sampled the oldest token.", RL, "lower")
    yield Metric("rollout/staleness_mean", "updates", "The same, mean over tokens.", RL, "lower")
    yield Metric("rollout/multi_version", "share", "Share of responses during which weights changed.", RL)
    yield Metric("rollout/lost_groups", "groups", "Groups without a response, by failure of the engine.", RL, "lower")
    yield Metric("rollout/unscored_groups", "groups", "Groups that a reward could not score.", RL, "lower")
    yield Metric("rollout/filtered_duplicates", "responses", "Dropped: the same tokens as another response.", RL)
    yield Metric("rollout/filtered_truncated", "responses", "Dropped, or masked in the loss: truncated.", RL)
    yield Metric("rollout/filtered_zero_std_groups", "groups", "Dropped: all rewards are equal.", RL)
    yield Metric(
        "rollout/filtered_small_groups", "groups", "Dropped: too few responses remain, or none to train on.", RL
    )
    yield Metric("rollout/requests_sent", "requests", "Requests sent to servers in this step.", RL, varies=True)
    yield Metric("rollout/requests_failed", "requests", "Requests given up.", RL, "lower", varies=True)
    yield Metric(
        "rollout/requests_resent", "requests", "Requests sent again after a failure.", RL, "lower", varies=True
    )
    yield Metric("rollout/server_restarts", "restarts", "Servers that were restarted.", RL, "lower", varies=True)
    yield Metric("rollout/resampled_prompts", "prompts", "Further prompts sampled in place of dropped groups.", RL)


def _critic() -> Iterator[Metric]:
    yield Metric("critic/loss", "reward squared", "Half the mean square of value - return, clipped.", RL, "lower")
    yield Metric("critic/clip_fraction", "share", "Share of tokens whose value was clipped.", RL)
    yield Metric("critic/value", "reward", "Mean value of a token.", RL)
    yield Metric("critic/return", "reward", "Mean return of a token.", RL, "higher")
    yield Metric(
        "critic/explained_variance", "share", "Share of the returns' variance known before the update.", RL, "higher"
    )
    yield Metric("critic/gradient_norm", "", "Norm of the critic's gradient before clipping.", RL)


def _mismatch() -> Iterator[Metric]:
    yield Metric("mismatch/logprob_max_abs", "nats", "Largest difference of a token's log-probability.", RL, "lower")
    yield Metric("mismatch/k1", "nats per token", "Mean of log(engine / trainer).", RL)
    yield Metric(
        "mismatch/k3", "nats per token", "Estimate of KL(engine || trainer) that is never negative.", RL, "lower"
    )
    yield Metric(
        "mismatch/outside_range", "share", "Share of tokens whose ratio is outside `rl.mismatch`'s range.", RL, "lower"
    )
    yield Metric(
        "mismatch/routing",
        "share",
        "Share of the engine's expert choices that the trainer's routers would not make.",
        RL,
        "lower",
    )
    yield Metric("mismatch/importance_weight", "", "Mean importance weight trainer / engine.", RL)
    yield Metric(
        "mismatch/importance_weight_clipped", "share", "Share of importance weights clipped or masked.", RL, "lower"
    )


def _moe() -> Iterator[Metric]:
    loaded, pretrain = (*SUPERVISED, *PREFERENCE), ("pretrain",)
    share = "multiple of an even share"
    yield Metric("moe/load_max", share, "Tokens of the busiest expert of any layer in this step.", loaded, "lower")
    yield Metric("moe/mtp_load_max", share, "The same of multi-token layers.", SUPERVISED, "lower")
    yield Metric(
        "moe/max_violation", share, "MaxVio over a window: busiest expert above an even share.", pretrain, "lower"
    )
    yield Metric("moe/mtp_max_violation", share, "The same of multi-token layers.", pretrain, "lower")
    yield Metric("moe/layer_load_max", share, "Tokens of the busiest expert by layer.", pretrain, "lower", table=True)
    yield Metric("moe/load", share, "Tokens of every expert by layer.", loaded, table=True)
    yield Metric("moe/bias_rate", "", "How far a step moves the routers' bias.", pretrain)


def _perf() -> Iterator[Metric]:
    def of(name: str, unit: str, meaning: str, commands: tuple[str, ...], better: Better) -> Metric:
        return Metric(f"perf/{name}", unit, meaning, commands, better, varies=True)

    without_rl = (*SUPERVISED, *PREFERENCE)
    yield of("tokens_per_second", "tokens per second", "Tokens trained on in a second.", without_rl, "higher")
    yield of(
        "phase_seconds/*",
        "s",
        "Rank 0's time in each phase since the row before, by phase; a save is in the row after it. They add up to the "
        "time between two rows. Phases: megatron_r1/parallel/phases.py.",
        ALL,
        "lower",
    )
    spread = "Over ranks, mean of a step, with several ranks and every train.log_interval steps:"
    for kind in ("min", "median", "max"):
        yield of(f"phase_seconds_{kind}/*", "s", f"{spread} {kind} of the time in each phase.", ALL, "lower")
        yield of(f"pass_seconds_{kind}", "s", f"{spread} {kind} of a rank's own work in passes.", ALL, "lower")
    slowest = "In the same rows: rank with most work in the phase, or in a phase without passes with most time."
    yield of("slowest_rank/*", "rank", slowest, ALL, "")
    yield Metric(
        "perf/stragglers",
        "multiple of the median",
        "A slow rank's own work in passes above the median of ranks with the same layers; once, when it is named.",
        ALL,
        "lower",
        table=True,
        varies=True,
    )
    yield of("mfu", "share", "Model FLOP/s over the devices' peak.", SUPERVISED, "higher")
    yield of("engine_seconds", "s", "Time in which the engine samples and rewards score a rollout.", RL, "lower")
    yield of("critic_seconds", "s", "The critic's share of the updates.", RL, "lower")
    yield of("trainer_idle", "share", "Share of a step in which the trainer does not train.", RL, "lower")
    yield of("engine_idle", "share", "Share of a step in which the engine has no requests.", RL, "lower")


METRICS: tuple[Metric, ...] = tuple(_entries())
_BY_NAME = {metric.name: metric for metric in METRICS}
_FAMILIES = tuple(metric for metric in METRICS if metric.name.endswith("/*"))


def find(name: str) -> Metric:
    """The description of a metric.

    Raises:
        ValueError: the registry has no such name.
    """
    if metric := _BY_NAME.get(name) or next((family for family in _FAMILIES if family.matches(name)), None):
        return metric
    raise ValueError(f"metric {name}: not in the registry megatron_r1/track/metrics.py")


def check(row: Mapping[str, object]) -> None:
    """Raises ValueError for a name that the registry does not have."""
    for name in row:
        if name != STEP:
            find(name)


def reproducible(row: Mapping[str, object]) -> dict[str, object]:
    """The part of a row that two runs of one configuration have in common."""
    return {name: value for name, value in row.items() if name == STEP or not find(name).varies}


def reference() -> str:
    """The page about all metrics, as Markdown."""
    lines = [
        "# Metrics",
        "",
        "Generated from `metrics.py` by `python -m megatron_r1.track.metrics`; a test compares.",
        "",
        "Every command that trains records one row a step, in `metrics.jsonl` of the run's folder and in wandb.",
        "`step` is the x-axis. A name that is not here is refused.",
        "Metrics marked * differ between two runs of one configuration.",
    ]
    for prefix, about in PREFIXES.items():
        lines += ["", f"## {prefix}/", "", about, ""]
        lines += ["| metric | unit | meaning | better | recorded by |", "|---|---|---|---|---|"]
        lines += [_line(metric) for metric in METRICS if metric.name.startswith(f"{prefix}/")]
    return "\n".join(lines) + "\n"


def _line(metric: Metric) -> str:
    name = f"`{metric.name.replace('/*', '/NAME')}`{' *' if metric.varies else ''}"
    meaning = metric.meaning.replace("|", "\\|") + (" A table." if metric.table else "")
    return f"| {name} | {metric.unit} | {meaning} | {metric.better} | {', '.join(metric.commands)} |"


if __name__ == "__main__":
    print(reference(), end="")
