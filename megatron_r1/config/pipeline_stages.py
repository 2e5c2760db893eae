"""What each pipeline stage holds: layers divided evenly, counted, or written as Megatron-LM writes a layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.errors import ConfigError

_MOST_REPEATS = 999
_GROUP, _LETTER = re.compile(r"\(([^()]*)\)\*(\d+)"), re.compile(r"([EtmL])\*(\d+)")


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """What one stage holds, in the order in which tokens pass through."""

    layers: int = 0
    """Layers of the backbone."""
    mtp_layers: int = 0
    """Multi-token layers."""
    embedding: bool = False
    """Whether it holds the embedding of the input tokens."""
    loss: bool = False
    """Whether it holds the output head, and the final norm where no stage before it does."""

    def words(self) -> list[str]:
        """As megatron-core's `pipeline_model_parallel_layout` lists it."""
        amounts = {"embedding": self.embedding, "decoder": self.layers, "mtp": self.mtp_layers, "loss": self.loss}
        return [word for word, amount in amounts.items() for _ in range(amount)]


def stages_with(layers: Sequence[int], mtp_layers: int) -> list[PipelineStage]:
    """Stages with these numbers of layers; multi-token layers and the loss are in the last."""
    last = len(layers) - 1
    return [
        PipelineStage(count, mtp_layers if index == last else 0, embedding=index == 0, loss=index == last)
        for index, count in enumerate(layers)
    ]


def divide_layers(num_layers: int, mtp_layers: int, stages: int) -> list[int] | None:
    """Layers of each stage; None where a stage before the last would get none.

    Evenly where they divide. Else multi-token layers and the output head count as a layer each, so that the last stage
    has fewer of the others: 61 layers and one multi-token layer on 16 stages are 15 x 4 and 1.
    """
    each, rest = divmod(num_layers, stages)
    if rest == 0:
        return [each] * stages
    last = max(0, (num_layers + mtp_layers + 1) // stages - mtp_layers - 1)
    each, larger = divmod(num_layers - last, stages - 1)
    return [*[each + 1] * larger, *[each] * (stages - 1 - larger), last] if each else None


def parse_layout(layout: str, stages: int) -> list[PipelineStage]:
    """Stages as Megatron-LM writes them, such as ``Et*3|(tt|)*29,m|L``.

    E is the embedding, t a layer, m a multi-token layer, L the loss; ``|`` ends a stage, ``*`` repeats the letter or
    the parentheses before it, commas and blanks mean nothing.

    Raises:
        ConfigError: it is no layout of this number of stages.
    """
    text = re.sub(r"[,\s]", "", layout)
    for repeated in (_GROUP, _LETTER):
        text = repeated.sub(lambda found: found[1] * min(int(found[2]), _MOST_REPEATS), text)
    written = text.split("|")
    if not re.fullmatch(r"E[t|]*[m|]*L", text):
        raise _refused(layout, "must be one E, then t, then m, then one L, divided by | into stages")
    if len(written) != stages:
        raise _refused(layout, f"must have {stages} stages, pipeline x virtual_pipeline, but has {len(written)}")
    if sum("m" in stage for stage in written) > 1:
        raise _refused(layout, "must have all m in one stage")
    return [PipelineStage(stage.count("t"), stage.count("m"), "E" in stage, "L" in stage) for stage in written]


def mtp_stage(stages: Sequence[PipelineStage]) -> int:
    """Index of the stage with the multi-token layers: the last, unless a written layout has another."""
    return next((index for index, stage in enumerate(stages) if stage.mtp_layers), len(stages) - 1)


def fitting_group_size(preferred: int, pipeline: int, passes: int) -> int | None:
    """Micro-batches that one interleaved stage passes before its rank turns to its next stage.

    megatron-core can schedule a number from `pipeline` on if what remains of all passes is none, or at least
    `pipeline` too. The fewer, the less memory.

    Args:
        preferred: the number to take if it fits.
        passes: micro-batches of a rank in one optimizer step.

    Returns:
        `preferred`, else the fewest; None where none fits, which is with fewer passes than pipeline ranks.
    """

    def fits(size: int) -> bool:
        return pipeline <= size <= passes and not 0 < passes % size < pipeline

    return next((size for size in (preferred, *range(pipeline, passes + 1)) if fits(size)), None)


def _refused(layout: str, allowed: str) -> ConfigError:
    return ConfigError("pipeline_layout", layout, allowed)
