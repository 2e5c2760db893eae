"""A checkpoint that differs from its manifest in one bit is refused, and the message names the file."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.checkpoint.manifest import (
    MANIFEST_NAME,
    divided,
    files_under,
    read_manifest,
    verify,
    write_manifest,
)
from megatron_r1.errors import CheckpointDamaged

METADATA: dict[Any, Any] = {
    "step": 7,
    "config": {"seed": 0, "betas": (0.9, 0.95)},
    "layout": {"tensor": 1},
    10: "ten",
    2: "two",
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step-00000007"
    (folder / "weights").mkdir(parents=True)
    generator = random.Random(1)
    for name, size in {
        "weights/__0_0.distcp": 5000,
        "weights/__1_0.distcp": 3000,
        ".metadata": 400,
        "state.json": 90,
    }.items():
        (folder / name).write_bytes(generator.randbytes(size))
    (folder / "empty").write_bytes(b"")
    write_manifest(folder, METADATA)
    return folder


def test_verify_returns_what_was_written(checkpoint: Path) -> None:
    manifest = verify(checkpoint)
    assert manifest == read_manifest(checkpoint)
    assert sorted(manifest.files) == [
        ".metadata",
        "empty",
        "state.json",
        "weights/__0_0.distcp",
        "weights/__1_0.distcp",
    ]
    assert manifest.files["weights/__1_0.distcp"].size == 3000
    assert manifest.metadata == json.loads(json.dumps(METADATA))


def test_every_flipped_bit_is_detected(checkpoint: Path) -> None:
    """1,000 random single-bit flips, spread over all files, the manifest itself among them."""
    seed = 20260101
    generator = random.Random(seed)
    paths = [path for path in files_under(checkpoint).values() if path.stat().st_size]
    silent = []
    for _ in range(1000):
        path = generator.choice(paths)
        whole = path.read_bytes()
        position, bit = generator.randrange(len(whole)), generator.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        try:
            verify(checkpoint)
            silent.append((path.name, position, bit))
        except CheckpointDamaged as error:
            assert path.name in str(error)
        path.write_bytes(whole)
    assert silent == [], f"seed {seed}"
    verify(checkpoint)


@pytest.mark.parametrize("part", [0, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["weights/__0_0.distcp", ".metadata", "state.json", MANIFEST_NAME])
def test_truncation_is_named(checkpoint: Path, name: str, part: float) -> None:
    path = checkpoint / name
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(CheckpointDamaged, match=Path(name).name):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["weights/__0_0.distcp", "empty", MANIFEST_NAME])
def test_missing_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointDamaged, match=f"{name} is missing"):
        verify(checkpoint)


def test_extra_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "weights/extra.pt").write_bytes(b"")
    with pytest.raises(CheckpointDamaged, match="extra.pt is not in the manifest"):
        verify(checkpoint)


def test_grown_file_is_named(checkpoint: Path) -> None:
    with (checkpoint / "state.json").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointDamaged, match="state.json has 91 bytes instead of 90"):
        verify(checkpoint)


def test_links_and_folders_do_not_pass_for_files(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    path.rename(checkpoint.parent / "elsewhere")
    path.symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(CheckpointDamaged, match="state.json is not a plain file"):
        verify(checkpoint)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointDamaged, match="state.json is missing"):
        verify(checkpoint)
    (checkpoint / "linked").symlink_to(checkpoint.parent, target_is_directory=True)
    path.rmdir()
    (checkpoint.parent / "elsewhere").rename(path)
    with pytest.raises(CheckpointDamaged, match="linked is not in the manifest"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "{", '{"format": 1}', '{"format": 3, "files": {"a": 3}, "metadata": {}}', "[" * 100_000],
)
def test_text_that_is_no_manifest_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointDamaged, match=MANIFEST_NAME):
        verify(checkpoint)


def test_manifest_of_another_format_is_refused(checkpoint: Path) -> None:
    raw = (checkpoint / MANIFEST_NAME).read_text()
    (checkpoint / MANIFEST_NAME).write_text(raw.replace('"format": 3', '"format": 1'))
    with pytest.raises(CheckpointDamaged, match="not of format 3"):
        verify(checkpoint)


def test_metadata_that_json_cannot_hold_is_a_bug_not_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_manifest(tmp_path, {"loss": float("nan")})
    assert not (tmp_path / MANIFEST_NAME).exists()


@pytest.mark.parametrize(
    ("sizes", "shares", "most"), [([8, 3, 3, 2, 1, 1], 2, 9), ([5], 3, 5), ([1] * 7, 3, 3), ([], 2, 0)]
)
def test_hashing_is_divided_evenly(sizes: list[int], shares: int, most: int) -> None:
    """Each file once; the fullest share has what no division could spare it."""
    named = {str(number): size for number, size in enumerate(sizes)}
    found = divided(named, shares)
    assert len(found) == shares and sorted(name for share in found for name in share) == sorted(named)
    assert max(sum(named[name] for name in share) for share in found) == most
