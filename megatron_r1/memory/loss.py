"""Bytes that computing a loss takes: logits, whole or a chunk of tokens at a time, and gradients of the output head."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.memory.activations import FP32, INT64, ActivationSizes
from megatron_r1.memory.chunks import PipelineChunk

CHUNK_LOGITS = 2**24
"""Logits that a loss in chunks computes at a time (model/lm_head.py)."""


@dataclass(frozen=True, slots=True)
class LossMemory:
    """Of a verb's loss on the last pipeline stage, and of multi-token layers' on theirs.

    megatron-core's cross-entropy keeps the exponentials of all logits; log-probabilities of reinforcement learning, of
    preferences and of packed examples, and multi-token layers' losses, compute a chunk's logits twice
    (model/vocab_parallel.py).
    """

    sizes: ActivationSizes
    verb: str

    @property
    def in_chunks(self) -> bool:
        packed = self.verb == "sft" and self.sizes.config.sft.packing != "none"
        return packed or self.verb in ("grpo", "dpo")

    @property
    def _rows(self) -> float:
        """Rows of the head on a rank."""
        return self.sizes.config.model.vocab_size / self.sizes.tensor

    def kept(self) -> float:
        """Per token of the one micro-batch that is at its loss: the last norm, and what gradients need."""
        width, element = self.sizes.config.model.hidden_size, self.sizes.element
        if self.in_chunks:
            # Tensor-parallel ranks gather the hidden states; log-probability, entropy, maximum and sum of each token.
            return self.sizes.norm(width) / self.sizes.tensor + element * width + 4 * FP32 + INT64
        kept = (self.sizes.norm(width) + element * width) / self.sizes.tensor
        return kept + FP32 * self._rows + 2 * INT64

    def workspace(self, chunk: PipelineChunk, tokens: float) -> float:
        """Besides what is kept, while gradients go back through the head."""
        if chunk.mtp:
            kept = FP32 * self._rows * tokens if chunk.loss and not self.in_chunks else 0.0
            # The exponentials are gone by then; the head's gradient waits for that of the multi-token layers.
            fused = self.sizes.config.performance.gradient_accumulation_fusion
            return max(0.0, self._chunked_gradients(tokens) + (not fused) * self._head(self.sizes.element) - kept)
        if not chunk.loss:
            return 0.0
        return self._chunked_gradients(tokens) if self.in_chunks else tokens * self._rows * self.sizes.element

    def scoring(self, tokens: float) -> float:
        """Of log-probabilities without gradients."""
        return self._chunk_logits(tokens) * 2 * FP32

    def _chunked_gradients(self, tokens: float) -> float:
        half = self.sizes.element == 2
        chunk = self._chunk_logits(tokens) * (2 * FP32 + 2 * half)
        # The head's gradient is summed in fp32, and in bf16 becomes one of the head's type at the end.
        return self._head(FP32) + max(chunk, 2 * half * self._head(1))

    def _chunk_logits(self, tokens: float) -> float:
        return min(tokens * self._rows, max(CHUNK_LOGITS, self._rows))

    def _head(self, each: float) -> float:
        return each * self._rows * self.sizes.config.model.hidden_size
