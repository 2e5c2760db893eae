"""dpo: direct preference optimization, which trains a policy on pairs of responses without a reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1.config.run import RunConfig
from megatron_r1.data.preference.examples import PreferenceDataset, TokenizedPreference
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.preference.dpo import DirectPreference, EvalPairs
from megatron_r1.preference.items import eval_items, training_items
from megatron_r1.preference.measure import eval_results
from megatron_r1.preference.reward_model import pairwise_accuracy
from megatron_r1.preference.step import (
    UpdateOutcome,
    encode_eval_pairs,
    preference_step,
    report_results,
    training_examples,
    with_epoch_steps,
)
from megatron_r1.rl.policy.reference import SAVED, ReferencePolicy
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.post_training import begin_post_training, trained_weights
from megatron_r1.runs.prompts import prompt_formatter
from megatron_r1.runs.training_run import finish_run, training_run
from megatron_r1.train.hooks.eval import EvalHook
from megatron_r1.train.loop import train
from megatron_r1.train.rewinds import skipping

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
    """Train a policy on pairs, or resume its run; then report how it orders validation pairs."""
    settings, size = config.dpo, config.train.micro_batch_size
    initial, tokenizer = initial_model(config)
    formatter = prompt_formatter(config, tokenizer)
    tokenizer = formatter.tokenizer
    encoder = PolicyPairEncoder(formatter)
    training = training_items(settings, config.data, settings.num_pairs)
    examples = training_examples(training, encoder, config, settings.epochs)
    longest = config.train.sequence_length
    eval_pairs, eval_encoded = encode_eval_pairs(eval_items(settings, config.data), encoder, longest)
    config = with_epoch_steps(config, len(examples) * settings.epochs)
    # The loss is on next tokens alone: multi-token layers are saved as they were loaded.
    with training_run(config, tokenizer, initial, trained_weights(config)) as run:
        begin_post_training(run)
        reference = ReferencePolicy(run.model, run.saved(SAVED))
        preference = DirectPreference(
            run.model,
            reference,
            settings.beta,
            settings.label_smoothing,
            tokenizer.pad,
            run.platform.device,
        )
        evaluation = EvalPairs(preference, eval_encoded, size)

        def learn(batch: Sequence[TokenizedPreference], rate: float) -> UpdateOutcome:
            return UpdateOutcome(*preference.learn(run.optimizer, batch, rate, size))

        hooks = run.hooks(
            SHOWN,
            "dpo",
            extra_shards=reference.saved,
            first=[EvalHook(evaluation, settings.eval_interval, config.train.steps)],
        )
        step = skipping(preference_step(config, PreferenceDataset(examples, config.seed), learn), run.rewinds)
        state = train(run.state, step, hooks, config.train.steps)
        if state.step >= config.train.steps:
            correct = pairwise_accuracy(torch.tensor(evaluation.margins())).tolist()
            report_results(run, eval_results(correct, training, eval_pairs, encoder), "implicit reward")
        finish_run(run, state)
