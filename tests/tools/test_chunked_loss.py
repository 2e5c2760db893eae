"""The benchmark of scores in chunks: in short, and at a real vocabulary's size, where its promise is made."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "tools/bench/chunked_loss.py"


@pytest.fixture(scope="module")
def bench(one_rank) -> ModuleType:
    spec = importlib.util.spec_from_file_location("chunked_loss", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("entropy", [[], ["--entropy"]])
def test_all_ways_agree_and_chunks_take_little_memory(bench, capsys, entropy):
    sizes = ["--tokens=1024", "--width=16", "--vocab-size=16384", f"--chunk-logits={2**19}", "--rounds=1"]
    found = bench.compared(bench.parsed([*sizes, *entropy]))
    assert {"in chunks", "all at once", "TRL from logits", "TRL in chunks"} <= found.keys()
    # What the allocator keeps for itself is not small beside these 64 MiB of logits; test_vocabulary counts tensors.
    assert found["in chunks"].extra_bytes < found["all at once"].extra_bytes / 3 > 2**26 / 3
    for one in found.values():
        assert one.loss == pytest.approx(found["all at once"].loss, rel=1e-6)
        for mine, theirs in zip(one.gradients, found["all at once"].gradients, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 2e-6
    assert "of the logits" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_at_full_size_memory_is_an_eighth_and_time_one_and_a_half():
    printed = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, check=True, timeout=1700
    ).stdout
    print(printed)
    speed = re.search(r"^in chunks +[^s]+ s +([\d.]+) ", printed, re.MULTILINE)
    memory = re.search(r"^in chunks .* MiB, ([\d.]+) of the logits", printed, re.MULTILINE)
    assert speed and memory and float(speed[1]) >= 1 / 1.5 and float(memory[1]) <= 1 / 8


def test_threads_and_sizes_are_read(bench):
    given = bench.parsed([])
    assert (given.tokens, given.width, given.vocab_size, given.threads) == (4096, 256, 129_280, 2)
