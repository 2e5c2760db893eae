"""What is installed, against importlib.metadata; and the lock file that fits it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sysconfig
from pathlib import Path

import pytest

from megatron_r1.platform.installed import PACKAGES, canonical, distributions, driver, lock, versions


def test_versions_are_those_of_the_packages():
    found = versions()
    assert found.keys() == set(PACKAGES) and found["torch"] and found["wandb"]
    for name, version in found.items():
        try:
            assert importlib.metadata.version(name) == version
        except importlib.metadata.PackageNotFoundError:
            assert version is None


def test_every_distribution_is_found():
    """In the environment's own folder: setuptools adds one with copies of others when it is imported."""
    folder = [sysconfig.get_path("purelib")]
    theirs = {canonical(one.name): one.version for one in importlib.metadata.distributions(path=folder)}
    assert len(theirs) > 100
    assert {name: distributions().get(name) for name in theirs} == theirs


def test_the_lock_is_the_one_that_fits_best(tmp_path):
    torch = importlib.metadata.version("torch").partition("+")[0]
    (tmp_path / "cpu.txt").write_text(f"# comment\ntorch=={torch}\nwandb==0.0.1 ; python_version > '3'\n")
    (tmp_path / "gpu.txt").write_text("torch==0.1\nnever-made==1.0\nwandb==0.0.1\n")
    found = lock(tmp_path)
    assert found and found.file == "cpu.txt"
    assert found.sha256 == hashlib.sha256((tmp_path / "cpu.txt").read_bytes()).hexdigest()
    assert found.differing == (f"wandb 0.0.1, {importlib.metadata.version('wandb')}",)
    (tmp_path / "cpu.txt").unlink()
    second = lock(tmp_path)
    assert second and "never-made 1.0, not installed" in second.differing
    assert lock(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build", "580.95.05"),
        ("nothing", None),
    ],
)
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, line, version):
    (tmp_path / "version").write_text(f"{line}\nGCC version: gcc version 12.3.0\n")
    assert driver(tmp_path / "version") == version
    assert driver(tmp_path / "none") is None
