"""dpo: direct preference optimization, a policy learned from pairs of answers without a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_r1.config.run import RunConfig
from megatron_r1.data.preference.examples import PreferenceDataset, TokenizedPreference
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.errors import DataError
from megatron_r1.evaluation.intervals import clustered
from megatron_r1.model.chunks import in_multi_token_layer
from megatron_r1.preference.dpo import DirectPreference, HeldoutPairs
from megatron_r1.preference.items import heldout_items, learned_items
from megatron_r1.preference.measure import results_of
from megatron_r1.preference.reward_model import pairwise_accuracy
from megatron_r1.preference.step import (
    UpdateOutcome,
    examples_of,
    log_dropped,
    preference_step,
    report_results,
    with_epoch_steps,
)
from megatron_r1.rl.policy.reference import SAVED, ReferencePolicy
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.prompts import prompt_formatter
from megatron_r1.runs.training_run import finish_run, training_run
from megatron_r1.train.hooks.eval import EvalHook
from megatron_r1.train.loop import train
from megatron_r1.train.routing import FROZEN

SHOWN = (
    "train/loss",
    "train/accuracy",
    "train/margin",
    "eval/accuracy",
    "eval/margin",
    "train/gradient_norm",
    "train/learning_rate",
)


def run(config: RunConfig) -> None:
    """Train a policy on pairs, or go on where its run stopped; then say how it orders held-out pairs."""
    settings, size = config.dpo, config.train.micro_batch_size
    weights, tokenizer = initial_model(config)
    encoder = PolicyPairEncoder(prompt_formatter(config, tokenizer))
    learned = learned_items(settings, config.data, settings.num_pairs)
    examples = examples_of(learned, encoder, config, settings.epochs)
    measured, pairs = measured_pairs(heldout_items(settings, config.data), encoder, config.train.sequence_length)
    config = with_epoch_steps(config, len(examples) * settings.epochs)
    # Answers predict one token at a time: the multi-token layers are carried through untouched.
    with training_run(config, tokenizer, weights, trainable=lambda name: not in_multi_token_layer(name)) as run:
        FROZEN.apply(run.model, 0)
        reference = ReferencePolicy(run.model, run.saved(SAVED))
        preference = DirectPreference(
            run.model,
            reference,
            settings.beta,
            settings.label_smoothing,
            tokenizer.pad,
            run.platform.device,
            config.parallel.tensor,
        )
        heldout = HeldoutPairs(preference, pairs, size)

        def learn(batch: Sequence[TokenizedPreference], rate: float) -> UpdateOutcome:
            return UpdateOutcome(*preference.learn(run.optimizer, batch, rate, size))

        hooks = run.hooks(
            SHOWN,
            "dpo",
            extra_shards=reference.saved,
            first=[EvalHook(measure_of(heldout), settings.eval_interval, config.train.steps)],
        )
        step = preference_step(config, PreferenceDataset(examples, config.seed), learn)
        state = train(run.state, step, hooks, config.train.steps)
        if state.step >= config.train.steps:
            right = pairwise_accuracy(torch.tensor(heldout.margins())).tolist()
            report_results(run, results_of(right, learned, measured, encoder), "implicit reward")
        finish_run(run, state)


def measured_pairs(
    items: Sequence[PreferenceExample], encoder: PolicyPairEncoder, longest: int
) -> tuple[list[PreferenceExample], list[TokenizedPreference]]:
    """Held-out pairs and their tokens; those too long for a row are left out and counted.

    Raises:
        DataError: none is left.
    """
    encoded = [(item, encoder.example(item)) for item in items]
    kept = [(item, example) for item, example in encoded if example.length <= longest]
    log_dropped("held-out pairs", len(kept), len(encoded) - len(kept))
    if not kept:
        raise DataError(f"train.sequence_length={longest}: holds none of the {len(encoded)} held-out pairs")
    return [item for item, _ in kept], [example for _, example in kept]


def measure_of(heldout: HeldoutPairs) -> Callable[[], dict[str, float]]:
    """What is measured now and then: how many held-out pairs are in order, a 95 % interval, and the mean margin."""

    def measure() -> dict[str, float]:
        margins = torch.tensor(heldout.margins(), dtype=torch.float64)
        found = clustered(pairwise_accuracy(margins).tolist())
        return {
            "eval/accuracy": found.mean,
            "eval/accuracy_low": found.low,
            "eval/accuracy_high": found.high,
            "eval/margin": float(margins.mean()),
        }

    return measure
