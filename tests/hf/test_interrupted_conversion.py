"""A conversion that is killed, crashes or runs out of disk: nothing is published, and the next call goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch import Tensor

from megatron_r1.checkpoint.tensor_file import TensorFile
from megatron_r1.config.load import load
from megatron_r1.errors import DataError, FolderInUse
from megatron_r1.hf import conversion as conversion_module
from megatron_r1.hf.conversion import ConversionStopped
from megatron_r1.hf.workspace import open_workspace
from tests.support.conversions import convert, hf_of, native_run, native_weights, same_bits
from tests.support.launching import marked_processes

MODEL = load("convert").model
SUPPORT = Path(__file__).parents[1] / "support"
SETTINGS = {"dtype": "fp8", "max_shard_gb": 1e-4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_run(tmp_path_factory.mktemp("native") / "run", MODEL, native_weights(MODEL))


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("undisturbed") / "run", **SETTINGS)


def same_files(left: Path, right: Path) -> bool:
    names = {path.name for path in left.iterdir()}
    return names == {path.name for path in right.iterdir()} and all(
        (left / name).read_bytes() == (right / name).read_bytes() for name in names - {"audit.json"}
    )


def failing_after(files: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `files` files be finished and the next one fail halfway; returns the names of those begun."""
    begun: list[str] = []
    proper = TensorFile.write

    class Failing(TensorFile):
        def __init__(self, path: Path, *rest: object):
            begun.append(path.name)
            super().__init__(path, *rest)

        def write(self, name: str, tensor: Tensor, blake3_hex: str | None = None) -> None:
            if len(begun) > files and len(self._waiting) < 3:
                raise error
            proper(self, name, tensor, blake3_hex)

    monkeypatch.setattr(conversion_module, "TensorFile", Failing)
    return begun


def test_it_resumes_with_the_finished_files(
    checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_after(4, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, tmp_path / "run", **SETTINGS)
    assert not (tmp_path / "run" / "hf").exists()
    files = sorted((tmp_path / "run" / "hf.tmp" / "files").iterdir())
    assert len(files) == 5
    damaged = files[1].read_bytes()
    files[1].write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))  # as a disk may
    with monkeypatch.context() as patch:
        begun = failing_after(1000, OSError(), patch)
        folder = convert(checkpoint, tmp_path / "run", **SETTINGS)
    assert files[1].name in begun and files[4].name in begun
    assert not {files[0].name, files[2].name, files[3].name} & set(begun)
    assert same_files(folder, undisturbed)
    assert not (tmp_path / "run" / "hf.tmp").exists()


def test_another_conversion_starts_anew(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing_after(4, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            convert(checkpoint, tmp_path / "run", **SETTINGS)
    (tmp_path / "run" / "config.yaml").unlink()
    other = native_weights(MODEL, seed=1)
    again = convert(native_run(tmp_path / "other", MODEL, other), tmp_path / "run", **SETTINGS)
    assert same_bits(hf_of(again), hf_of(convert(tmp_path / "other", tmp_path / "third", **SETTINGS)))


def test_a_full_disk_is_one_line_and_what_is_finished_stays(
    checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing_after(3, OSError(28, "No space left on device"), patch)
        with pytest.raises(ConversionStopped, match=r"^No space left on device: .*; the same command") as error:
            convert(checkpoint, tmp_path / "run", **SETTINGS)
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "hf").exists()
    assert same_files(convert(checkpoint, tmp_path / "run", **SETTINGS), undisturbed)


def test_a_refusal_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_after(3, DataError("bad"), monkeypatch)
    with pytest.raises(DataError, match="bad"):
        convert(checkpoint, tmp_path / "run", **SETTINGS)
    assert not list((tmp_path / "run").glob("hf*"))


def test_two_conversions_do_not_share_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    with open_workspace(tmp_path / "run" / "hf.tmp", "mine"), pytest.raises(FolderInUse, match="is in use"):
        convert(checkpoint, tmp_path / "run", **SETTINGS)


def test_checkpoints_resume_too(checkpoint: Path, undisturbed: Path, tmp_path: Path) -> None:
    settings = {"to": "native", "dtype": "fp32", "max_shard_gb": 1e-4}
    with pytest.MonkeyPatch.context() as patch:
        failing_after(4, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            convert(f"hf:{undisturbed}", tmp_path / "run", **settings)
        assert not (tmp_path / "run" / "checkpoints").exists()
        begun = failing_after(1000, OSError(), patch)
        convert(f"hf:{undisturbed}", tmp_path / "run", **settings)
    assert "model-00003.safetensors" not in begun and "model-00004.safetensors" in begun
    assert same_files(convert(tmp_path / "run", tmp_path / "again", **SETTINGS), undisturbed)


def started(checkpoint: Path, run: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A conversion in two further processes that has finished a few files; itself, and those two."""
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "slow_convert.py"), str(checkpoint), str(run)],
        env=os.environ | {"MEGATRON_R1_TEST": str(run)},
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list((run / "hf.tmp" / "records").glob("*.json"))) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return process, workers


@pytest.mark.parametrize("kill", ["a process", "the first", "Ctrl-C"])
def test_a_kill_leaves_no_process_and_the_next_call_resumes(
    kill: str, checkpoint: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    process, workers = started(checkpoint, run)
    if kill == "a process":
        workers[1].kill()
    elif kill == "the first":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=30)[1]
    assert process.returncode != 0
    if kill == "a process":
        assert "ended with status -9; the same command" in said.splitlines()[-1] and "Traceback" not in said
    deadline = time.monotonic() + 20
    while left := marked_processes(str(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not (run / "hf").exists()
    finished = {path.name.removesuffix(".json") for path in (run / "hf.tmp" / "records").iterdir()}
    begun = failing_after(1000, OSError(), monkeypatch)  # seen in this process only
    folder = convert(checkpoint, run, **SETTINGS, workers=2 if kill == "Ctrl-C" else 1)
    assert same_files(folder, undisturbed)
    assert len(finished) >= 3 and not finished & set(begun) and bool(begun) == (kill != "Ctrl-C")
