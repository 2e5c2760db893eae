"""Programs hidden where a checkpoint or a Hugging Face folder holds data: none of them ever runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_r1.checkpoint.manifest import MANIFEST_NAME, read_manifest, write_manifest
from megatron_r1.checkpoint.store import newest_verified, step_folders
from megatron_r1.checkpoint.tensors import read_state, read_tensors
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ExitCode, UserError
from megatron_r1.runs.initial_weights import find_weights
from tests.support.jobs import PRETRAIN, SHORT, Job, run_alone
from tests.support.whole_models import export


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a payload makes when it runs."""
    return tmp_path / "it-ran"


@pytest.fixture
def run(root: Path, pretrained: object, tmp_path: Path) -> Path:
    """A copy of a run on two ranks with its newest checkpoint alone."""
    newest = step_folders(root / "base" / "checkpoints")[0][1]
    folder = tmp_path / "attacked"
    shutil.copytree(newest, folder / "checkpoints" / newest.name)
    pinned = (root / "base" / "config.yaml").read_text()
    (folder / "config.yaml").write_text(
        pinned.replace(str(root), str(tmp_path)).replace("name: base", "name: attacked")
    )
    return folder


def checkpoint_of(run: Path) -> Path:
    return step_folders(run / "checkpoints")[0][1]


def make_consistent(checkpoint: Path) -> None:
    """What an attacker who can write a checkpoint can also do: a manifest that goes with it."""
    metadata = read_manifest(checkpoint).metadata
    (checkpoint / MANIFEST_NAME).unlink()
    write_manifest(checkpoint, metadata)


def read_all(run: Path) -> None:
    """Everything that a resume or a start from weights reads of a checkpoint."""
    checkpoint, _ = newest_verified(run / "checkpoints")
    read_state(checkpoint)
    read_tensors(checkpoint, "random", 0)
    weights = find_weights(str(run))
    for name in weights.tensors:
        weights.tensors[name]
    Tokenizer.load(weights.tokenizer_folder)


def pickled(payload: Payload) -> bytes:
    return pickle.dumps(payload)


def zipped(payload: Payload) -> bytes:
    """As torch.save writes it."""
    path = payload.mark.with_name("payload.pt")
    torch.save({"model": payload}, path)
    return path.read_bytes()


def in_header(payload: Payload) -> bytes:
    """A safetensors file whose metadata is a pickle in text."""
    path = payload.mark.with_name("payload.safetensors")
    save_file({"0": torch.zeros(2)}, path, {"parts": pickle.dumps(payload, 0).decode()})
    return path.read_bytes()


def test_the_payloads_work(mark):
    pickle.loads(pickled(Payload(mark)))
    assert mark.exists()
    mark.rmdir()
    zipped(Payload(mark))
    torch.load(mark.with_name("payload.pt"), weights_only=False)
    assert mark.exists()


@pytest.mark.dist
@pytest.mark.parametrize("make", [pickled, zipped, in_header])
@pytest.mark.parametrize(
    "name", ["state.json", "model-00000.safetensors", "random-00000.safetensors", "tokenizer/tokenizer.json"]
)
def test_in_place_of_a_checkpoints_file(run, mark, name, make):
    path = checkpoint_of(run) / name
    path.write_bytes(make(Payload(mark)))
    with pytest.raises(UserError, match="no other checkpoint"):
        newest_verified(run / "checkpoints")
    make_consistent(checkpoint_of(run))
    if not (name.startswith("random") and make is in_header):  # there a file of other tensors is read, and nothing run
        with pytest.raises(UserError):
            read_all(run)
    assert not mark.exists()


@pytest.mark.dist
def test_beside_a_checkpoints_files(run, mark, tmp_path):
    """Names that other trainers read, and code that a tokenizer's config asks for."""
    checkpoint = checkpoint_of(run)
    for name in (".metadata", "common.pt", "model-00001.pt", "pytorch_model.bin", "metadata.json"):
        (checkpoint / name).write_bytes(pickled(Payload(mark)))
    attack_tokenizer(checkpoint / "tokenizer", mark)
    with pytest.raises(UserError, match="is not in the manifest|has digest|bytes instead"):
        newest_verified(run / "checkpoints")
    make_consistent(checkpoint)
    read_all(run)
    assert not mark.exists()
    (checkpoint / "state.json").write_bytes(pickled(Payload(mark)))
    make_consistent(checkpoint)
    done = run_alone(Job([*PRETRAIN, *SHORT], tmp_path, "attacked", forked=True))
    assert done.returncode == ExitCode.BAD_DATA and done.stderr.splitlines()[-1].endswith("state.json: is no JSON")
    assert "Traceback" not in done.stderr and not mark.exists()


def attack_tokenizer(folder: Path, mark: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    config["chat_template"] = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    path.write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")


HIDE: dict[str, Callable[[Path, Payload], object]] = {
    "weights are a pickle": lambda folder, payload: (folder / "model.safetensors").write_bytes(zipped(payload)),
    "only old weights": lambda folder, payload: (
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        (folder / "pytorch_model.bin").write_bytes(zipped(payload)),
    ),
    "an index of old weights": lambda folder, payload: (
        (folder / "pytorch_model.bin").write_bytes(zipped(payload)),
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "pytorch_model.bin")})
        ),
    ),
    "the config is a pickle": lambda folder, payload: (folder / "config.json").write_bytes(pickled(payload)),
}


@pytest.fixture
def hugging_face(run: Path, tmp_path: Path) -> Path:
    found = find_weights(str(run))
    return export(found.tensors.items(), found.model, tmp_path / "hf", tokenizer_folder=found.tokenizer_folder)


def read_hugging_face(folder: Path) -> None:
    weights = find_weights(f"hf:{folder}")
    for name in weights.tensors:
        weights.tensors[name]
    Tokenizer.load(weights.tokenizer_folder)


@pytest.mark.dist
@pytest.mark.parametrize("how", HIDE)
def test_in_a_hugging_face_folder(hugging_face, mark, how):
    read_hugging_face(hugging_face)
    HIDE[how](hugging_face, Payload(mark))
    with pytest.raises(UserError):
        read_hugging_face(hugging_face)
    assert not mark.exists()


@pytest.mark.dist
def test_code_that_a_hugging_face_config_names(hugging_face, mark):
    config = json.loads((hugging_face / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (hugging_face / "config.json").write_text(json.dumps(config))
    attack_tokenizer(hugging_face, mark)
    read_hugging_face(hugging_face)
    assert not mark.exists()
