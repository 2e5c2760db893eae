"""A trained reward model as a reward: loaded into the policy's processes, it scores batches of responses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.schema import convert
from megatron_r1.model.reward_head import add_reward_head
from megatron_r1.platform import Platform
from megatron_r1.preference.items import reward_model_encoder
from megatron_r1.preference.measure import score_texts
from megatron_r1.preference.reward_model import RewardModel
from megatron_r1.rewards.reward import RewardPrompt, Value
from megatron_r1.runs.second_model import check_shareable, find_reward_model, second_model


class RewardModelScorer:
    """Scores responses by the reward model of a run; collective over all ranks, among which the model is divided.

    All ranks must call it with the same arguments at the same time, from the thread that uses their process groups;
    `rl.generation.reward_service` does that.
    """

    def __init__(
        self, source: str, parallel: ParallelConfig, platform: Platform, key: str = "reward_model", name: str = ""
    ):
        """Load the model from `source`. Collective over all ranks, whose process groups must exist.

        Args:
            source: run or checkpoint directory of the verb reward_model.
            parallel: degrees of parallelism, which may differ from those in its training.
            key: configuration key to name in an error.
            name: of the reward; empty is helpfulness for a pairwise and harmlessness for a pointwise model.

        Raises:
            ConfigError: there is no reward model, or these degrees do not divide it.
            CheckpointDamaged: there is a checkpoint, but neither it nor an older one verifies.
        """
        found = find_reward_model(source, key)
        check_shareable(parallel, found.model, source, key)
        settings = convert(RewardModelConfig, read_manifest(found.folder).metadata["config"]["reward_model"])
        model = second_model(found.model, parallel, platform, found.tensors, add_reward_head)
        model.requires_grad_(False)
        tokenizer = found.tokenizer()
        self._pairwise = settings.objective == "pairwise"
        self.name = name or ("helpfulness" if self._pairwise else "harmlessness")
        self._encoder = reward_model_encoder(settings, tokenizer)
        self._max_critique_tokens = settings.max_critique_tokens
        self._model = RewardModel(model, self._pairwise, settings.critique_loss_weight, tokenizer.pad, platform.device)

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """A value for each response: the score of a pairwise model, the probability of safe of a pointwise one.

        The model reads the same part of a response, its summary or all of it, as in its training.
        """
        questions = [prompt.question for prompt in prompts]
        scores = score_texts(self._model, self._encoder, questions, texts, self._max_critique_tokens)
        return [*scores] if self._pairwise else torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()
