"""The in-process engine samples from Transformer Engine's modules what they give in a full forward pass."""

from __future__ import annotations

import json
from pathlib import Path

from tests.transformer_engine.on_cpu import needs_transformer_engine, run_with_transformer_engine


@needs_transformer_engine
def test_log_probs_of_padded_prompts_equal_a_full_forward_pass(tmp_path):
    run_with_transformer_engine(Path(__file__).with_name("ranks_sampling.py"), tmp_path, seconds=100)
    gaps = json.loads((tmp_path / "gaps.json").read_text())
    print(gaps)
    assert len(gaps) == 2 and max(gaps.values()) < 1e-5
