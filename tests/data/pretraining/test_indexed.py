"""The indexed format against megatron-core's own writer and reader, and what damage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_r1.data.pretraining.indexed import IndexedTokens, IndexedWriter, token_dtype
from megatron_r1.errors import DataError


def some_documents(high: int, count: int = 50) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(0, high, chance.integers(1, 90)) for _ in range(count)]


def write(prefix, documents, dtype):
    with IndexedWriter(prefix, dtype) as writer:
        for start in range(0, len(documents), 7):  # several batches
            batch = documents[start : start + 7]
            writer.add(np.concatenate(batch), np.array([len(document) for document in batch]))
    return writer


@pytest.mark.parametrize("vocab_size", [512, 65_499, 65_500, 129_280])
def test_files_are_those_of_megatron_and_read_by_it(tmp_path, one_rank, vocab_size):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    documents, dtype = some_documents(vocab_size), token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    write(tmp_path / "ours", documents, dtype)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert len(read) == len(documents) and list(read.document_indices) == list(range(len(documents) + 1))
    assert all((read[index] == document).all() for index, document in enumerate(documents))


def test_what_is_written_is_read(tmp_path):
    documents = some_documents(70_000)
    write(tmp_path / "a.b", documents, token_dtype(70_000))
    read = IndexedTokens(tmp_path / "a.b")
    assert len(read) == len(documents) and isinstance(read.tokens, np.memmap)
    assert all((read.document(index) == document).all() for index, document in enumerate(documents))


def test_documents_of_several_sequences_are_read_whole(tmp_path, one_rank):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [3, 7])
    builder.add_document(torch.arange(20, 25), [5])
    builder.finalize(str(tmp_path / "x.idx"))
    read = IndexedTokens(tmp_path / "x")
    assert [read.document(index).tolist() for index in range(len(read))] == [list(range(10)), list(range(20, 25))]


def test_no_document_at_all_is_read(tmp_path):
    with IndexedWriter(tmp_path / "x", np.dtype(np.int32)):
        pass
    assert len(IndexedTokens(tmp_path / "x")) == 0


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("x.idx", lambda raw: raw[:-1], "is cut short"),
        ("x.idx", lambda raw: raw[:10], "is cut short"),
        ("x.idx", lambda raw: b"", "is cut short"),
        ("x.idx", lambda raw: b"X" + raw[1:], "is not an index"),
        ("x.bin", lambda raw: raw[:-2], "its index requires"),
        ("x.bin", lambda raw: raw + raw, "its index requires"),
    ],
)
def test_damage_is_named(tmp_path, file, damage, message):
    write(tmp_path / "x", some_documents(512), token_dtype(512))
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    with pytest.raises(DataError, match=f"{file}.*{message}"):
        IndexedTokens(tmp_path / "x")


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "x", some_documents(512), token_dtype(512))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(DataError, match=r"x\.bin: cannot be read"):
        IndexedTokens(tmp_path / "x")


def test_lengths_must_add_up(tmp_path):
    with pytest.raises(ValueError, match="3 tokens"), IndexedWriter(tmp_path / "x", np.dtype(np.int32)) as writer:
        writer.add(np.arange(3), np.array([2]))
    assert not (tmp_path / "x.idx").exists()
