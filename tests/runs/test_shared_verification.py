"""Ranks that start from a checkpoint divide its hashing among them, and hash no more than they read."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint import manifest
from megatron_r1.checkpoint.retention import Retention
from megatron_r1.checkpoint.sharded import TensorPart, write_parts
from megatron_r1.checkpoint.store import CheckpointStore, OneRank
from megatron_r1.config.data import DataConfig
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.schema import resolved
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.errors import CheckpointDamaged
from megatron_r1.runs.initial_weights import find_initial_model, find_weights
from tests.support.thread_ranks import ThreadRanks, on_two_ranks

FILES, KINDS, ROWS = 4, ("model", "ema", "main", "exp_avg", "exp_avg_sq"), 4096


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DataConfig(num_documents=300))


@pytest.fixture
def run(tmp_path, tokenizer) -> Path:
    """A run with two checkpoints of four ranks; the tensor `step` says which of the two it is from."""

    def write(step: int):
        def files(folder: Path) -> None:
            tokenizer.save(folder / "tokenizer")
            for kind in KINDS:
                for rank in range(FILES):
                    part = torch.full((ROWS, 8), float(step))
                    write_parts(folder, kind, rank, [TensorPart("step", (FILES * ROWS, 8), (rank * ROWS, 0), part)])

        return files

    with CheckpointStore(tmp_path / "checkpoints") as store:
        for step in (1, 2):
            store.commit(step, write(step), {"config": {"model": resolved(ModelConfig())}})
    return tmp_path


@pytest.fixture
def hashed(monkeypatch) -> dict[int, list[str]]:
    """The files that each thread has hashed, without the small ones."""
    found: dict[int, list[str]] = {}
    plain = manifest.digests

    def digests(paths, *others):
        tensors = [path.name for path in paths if path.suffix == ".safetensors"]
        found.setdefault(threading.get_ident(), []).extend(tensors)
        return plain(paths, *others)

    monkeypatch.setattr(manifest, "digests", digests)
    return found


def damage(run: Path, file: str) -> None:
    path = run / "checkpoints" / "step-00000002" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", ["model", "ema"])
def test_ranks_hash_what_they_read_once_and_nothing_of_the_optimizer(run, hashed, which):
    def read(ranks: ThreadRanks) -> int:
        initial = find_initial_model(str(run), which=which)
        assert not any(hashed.values()), "a rank hashes tensors alone"
        ranks.barrier.wait(timeout=10)
        assert initial.weights(ranks).tensors["step"].unique().tolist() == [2]
        return threading.get_ident()

    shares = [hashed[thread] for thread in on_two_ranks(read)]
    assert [len(share) for share in shares] == [FILES // 2, FILES // 2]
    assert sorted(shares[0] + shares[1]) == [f"{which}-{rank:05}.safetensors" for rank in range(FILES)]


@pytest.mark.parametrize(
    "file", [f"model-{FILES - 1:05}.safetensors", "model-00000.safetensors", "tokenizer/tokenizer.json"]
)
def test_damage_that_one_rank_finds_sends_all_to_the_older_one(run, file):
    damage(run, file)

    def read(ranks: ThreadRanks) -> tuple[str, list[float]]:
        weights = find_initial_model(str(run)).weights(ranks)
        return weights.folder.name, weights.tensors["step"].unique().tolist()

    assert on_two_ranks(read) == [("step-00000001", [1.0])] * 2


def test_damage_of_what_is_not_read_is_no_hindrance(run):
    damage(run, "exp_avg-00001.safetensors")
    damage(run, "ema-00000.safetensors")
    assert find_weights(str(run)).folder.name == "step-00000002"
    assert find_weights(str(run), which="ema").folder.name == "step-00000001"
    with pytest.raises(CheckpointDamaged, match=r"(ema|exp_avg)-0000\d\.safetensors has digest"):
        manifest.verify(run / "checkpoints" / "step-00000002")


def test_a_file_that_the_manifest_does_not_list_is_refused_whatever_is_read(run):
    (run / "checkpoints" / "step-00000002" / "model-00004.safetensors").write_bytes(b"foreign")
    assert find_initial_model(str(run)).weights(OneRank()).folder.name == "step-00000001"


def test_ranks_divide_the_hashing_of_old_checkpoints_too(run, hashed):
    """Pruning verifies what another job left before it counts it."""

    def prune(ranks: ThreadRanks) -> int:
        with CheckpointStore(run / "checkpoints", Retention(3), ranks) as store:
            store.prune()
        return threading.get_ident()

    shares = [hashed[thread] for thread in on_two_ranks(prune)]
    assert [len(share) for share in shares] == [len(KINDS) * FILES] * 2  # of two checkpoints half each
