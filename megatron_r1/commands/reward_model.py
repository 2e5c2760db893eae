"""reward_model: a language model with a scalar head, trained on preference pairs or labelled responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_r1.config.run import RunConfig
from megatron_r1.data.preference.examples import PreferenceDataset, TokenizedPreference
from megatron_r1.model.reward_head import add_reward_head, with_head
from megatron_r1.parallel.mesh import data_parallel_group
from megatron_r1.preference.items import eval_items, reward_model_encoder, training_items
from megatron_r1.preference.measure import EvalAccuracy, eval_results
from megatron_r1.preference.reward_model import RewardModel
from megatron_r1.preference.step import (
    LearnPreferences,
    UpdateOutcome,
    preference_step,
    report_results,
    training_examples,
    with_epoch_steps,
)
from megatron_r1.runs.initial_weights import initial_model
from megatron_r1.runs.post_training import begin_post_training, trained_weights
from megatron_r1.runs.training_run import TrainingRun, finish_run, training_run
from megatron_r1.train.hooks.eval import EvalHook
from megatron_r1.train.loop import train
from megatron_r1.train.rewinds import skipping
from megatron_r1.train.update import update

SHOWN = (
    "train/loss",
    "train/accuracy",
    "train/margin",
    "train/reasoning_loss",
    "eval/accuracy",
    "train/gradient_norm",
    "train/learning_rate",
)


def run(config: RunConfig) -> None:
    """Train a reward model, or resume its run; then report its accuracy on validation examples."""
    settings = config.reward_model
    initial, tokenizer = initial_model(config)
    encoder = reward_model_encoder(settings, tokenizer)
    training = training_items(settings, config.data, settings.num_examples, settings.objective)
    evaluated = eval_items(settings, config.data, settings.objective)
    examples = training_examples(training, encoder, config, settings.epochs)
    config = with_epoch_steps(config, len(examples) * settings.epochs)
    initial = initial.with_tensors(lambda tensors: with_head(tensors, config.model.hidden_size))
    with training_run(config, tokenizer, initial, trained(config), add_reward_head) as run:
        begin_post_training(run)
        model = reward_model_of(run)
        measure = EvalAccuracy(model, encoder, evaluated, settings.max_critique_tokens)
        hooks = run.hooks(
            SHOWN,
            "reward_model",
            first=[EvalHook(measure, settings.eval_interval, config.train.steps)],
        )
        preferences = PreferenceDataset(examples, config.seed)
        step = skipping(preference_step(config, preferences, learning(run, model)), run.rewinds)
        state = train(run.state, step, hooks, config.train.steps)
        if state.step >= config.train.steps:
            report_results(run, eval_results(measure.per_example(), training, evaluated, encoder), "reward model")
        finish_run(run, state)


def trained(config: RunConfig) -> Callable[[str], bool]:
    """A function of a parameter's name: whether it is trained, that is whether scores or critiques depend on it."""
    trains_critiques, in_stage = config.reward_model.critique_loss_weight > 0, trained_weights(config)

    def depends(name: str) -> bool:
        return in_stage(name) and (trains_critiques or "output_layer" not in name.split("."))

    return depends


def reward_model_of(run: TrainingRun) -> RewardModel:
    """The run's model as a RewardModel."""
    settings = run.config.reward_model
    return RewardModel(
        run.model,
        settings.objective == "pairwise",
        settings.critique_loss_weight,
        run.tokenizer.pad,
        run.platform.device,
    )


def learning(run: TrainingRun, model: RewardModel) -> LearnPreferences:
    """A function that updates the reward model on a batch."""
    group, size = data_parallel_group(), run.config.train.micro_batch_size
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)

    def learn(batch: Sequence[TokenizedPreference], rate: float) -> UpdateOutcome:
        micro_batches = model.micro_batches(batch, rank, ranks, size)
        length = max(batch.inputs_BL.shape[1] for batch in micro_batches)
        result = update(run.model, run.optimizer, micro_batches, model.forward, rate, length)
        return UpdateOutcome(result, sum(batch.inputs_BL.numel() for batch in micro_batches))

    return learn
