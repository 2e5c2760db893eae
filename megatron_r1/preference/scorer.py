"""A trained reward model at work beside a policy: loaded into the same process, asked in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.config.schema import convert
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.reward_head import add_reward_head
from megatron_r1.platform import Platform
from megatron_r1.preference.items import reward_model_encoder
from megatron_r1.preference.measure import score_texts
from megatron_r1.preference.reward_model import RewardModel
from megatron_r1.rewards.reward import RewardPrompt, Value
from megatron_r1.runs.second_model import check_shareable, find_reward_model, second_model


class RewardModelScorer:
    """Scores answers as the reward model of a run does; collective over all ranks, which share model and work.

    All must ask the same at the same time, from the thread that uses their process groups: `rl.joint_scoring` makes a
    `Reward` of it.
    """

    def __init__(
        self, source: str, parallel: ParallelConfig, platform: Platform, key: str = "reward_model", name: str = ""
    ):
        """Collective over all ranks, whose process groups must exist: load the model that `source` names.

        Args:
            source: run or checkpoint directory of the verb reward_model.
            parallel: degrees by which the ranks share the work, which need not be those it was trained with.
            key: configuration key to name in an error.
            name: of the reward; empty is helpfulness or harmlessness, by what the model learned.

        Raises:
            ConfigError: there is no reward model, or these degrees do not divide it.
            CheckpointDamaged: there is a checkpoint, but neither it nor an older one verifies.
        """
        found = find_reward_model(source, key)
        check_shareable(parallel, found.model, source, key)
        settings = convert(RewardModelConfig, read_manifest(found.folder).metadata["config"]["reward_model"])
        model = second_model(found.model, parallel, platform, found.tensors, add_reward_head)
        model.requires_grad_(False)
        tokenizer = Tokenizer.load(found.tokenizer_folder)
        self._pairwise = settings.objective == "pairwise"
        self.name = name or ("helpfulness" if self._pairwise else "harmlessness")
        self._encoder = reward_model_encoder(settings, tokenizer)
        self._longest_reasoning = settings.max_critique_tokens
        self._model = RewardModel(
            model, self._pairwise, settings.critique_loss_weight, tokenizer.pad, platform.device, parallel.tensor
        )

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """A value for each response text: of a pairwise model its score, of a pointwise one the probability of safe.

        What is read of a response, its summary or all of it, is what the model was trained to read.
        """
        questions = [prompt.question for prompt in prompts]
        scores = score_texts(self._model, self._encoder, questions, texts, self._longest_reasoning)
        return [*scores] if self._pairwise else torch.tensor(scores, dtype=torch.float64).sigmoid().tolist()
