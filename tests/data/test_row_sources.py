"""Folders of Hugging Face datasets: the rows that `datasets` reads of one split and configuration, or a refusal."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.data.row_files import rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.errors import ConfigError, DataError, UserError


def lines(*numbers: int) -> bytes:
    return b"".join(json.dumps({"number": number}).encode() + b"\n" for number in numbers)


def parquet(*numbers: int) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([{"number": number} for number in numbers]), buffer)
    return buffer.getvalue().to_pybytes()


def readme(*configurations: str) -> bytes:
    return ("---\nlicense: mit\nconfigs:\n" + "\n".join(configurations) + "\n---\n# A dataset\n").encode()


ALL = "- config_name: all\n  data_files:\n  - split: train\n    path: all/train-*"
DEFAULT = "- config_name: default\n  data_files:\n  - split: train\n    path: default/train-*"
CONFIGURATIONS = {"all/train-0.jsonl": lines(1, 2, 3), "default/train-0.jsonl": lines(1, 2)}
HIDDEN = {".cache/train.jsonl": lines(9), "__pycache__/train.jsonl": lines(9), "data/.train.jsonl": lines(9)}

SAME = {
    "files": ({"train.jsonl": lines(1, 2), "test.jsonl": lines(3)}, {}),
    "other split": ({"train.jsonl": lines(1, 2), "test.jsonl": lines(3)}, {"split": "test"}),
    "validation by another name": ({"train.jsonl": lines(1), "dev.jsonl": lines(2)}, {"split": "validation"}),
    "shards in order": ({f"data/train-{n:05}-of-00012.parquet": parquet(n) for n in (*range(9, -1, -1), 10, 11)}, {}),
    "underscores": ({f"train_{n}.jsonl": lines(n) for n in range(11)}, {}),
    "folders of splits": (
        {"train/b.jsonl": lines(2), "train/a/x.jsonl": lines(1), "test/a.jsonl": lines(3)},
        {},
    ),
    "a file named as another split": ({"train/test.jsonl": lines(1), "test/train.jsonl": lines(2)}, {"split": "test"}),
    "gzip": ({"train.jsonl.gz": gzip.compress(lines(1, 2)), "test.jsonl.gz": gzip.compress(lines(3))}, {}),
    "an array": ({"train.json": b'[{"number": 1},\n{"number": 2}]'}, {}),
    "hidden files and folders": ({"data/train.jsonl": lines(1, 2), **HIDDEN}, {}),
    "no split in any name": ({"part-1.jsonl": lines(1), "part-2.jsonl": lines(2)}, {}),
    "files beside the rows": ({"train.jsonl": lines(1), "config.json": b"{}", "dataset_infos.json": b"{}"}, {}),
    "a split of its own name": (
        {f"data/train_{kind}-00000-of-00001.parquet": parquet(1) for kind in ("sft", "gen")},
        {"split": "train_sft"},
    ),
    "the README's only configuration": ({"README.md": readme(ALL), **CONFIGURATIONS}, {}),
    "the README's default": ({"README.md": readme(ALL, DEFAULT), **CONFIGURATIONS}, {}),
    "a configuration marked as default": (
        {
            "README.md": readme(ALL, DEFAULT.replace("name: default", "name: small") + "\n  default: true"),
            **CONFIGURATIONS,
        },
        {},
    ),
    "a configuration by name": ({"README.md": readme(ALL, DEFAULT), **CONFIGURATIONS}, {"subset": "all"}),
    "patterns of all kinds": (
        {
            "README.md": readme(
                "- config_name: x\n  data_files:\n  - split: train\n    path: ['b/**', 'a/[12].jsonl', ./c.jsonl]"
            ),
            **{
                f"{name}.jsonl": lines(number) for number, name in enumerate(("b/y/1", "b/2", "a/1", "a/2", "a/3", "c"))
            },
        },
        {},
    ),
    "one pattern": ({"README.md": readme("- config_name: x\n  data_files: '*.jsonl'"), "q.jsonl": lines(1)}, {}),
    "a folder of the configuration": (
        {"README.md": readme("- config_name: x\n  data_dir: all"), **CONFIGURATIONS},
        {},
    ),
    "a README without configurations": ({"README.md": b"---\nlicense: mit\n---\n", "train.jsonl": lines(1)}, {}),
    "a README with a mark and CRLF": (
        {"README.md": b"\xef\xbb\xbf" + readme(ALL, DEFAULT).replace(b"\n", b"\r\n"), **CONFIGURATIONS},
        {},
    ),
}


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def read(path: Path, **choice) -> list:
    return [row.content["number"] for row in rows_of(RowSource(path, **choice).files())]


@pytest.mark.parametrize("name", SAME)
def test_a_folder_gives_the_rows_that_datasets_gives(tmp_path, name):
    from datasets import load_dataset

    files, choice = SAME[name]
    folder = folder_of(tmp_path / "folder", files)
    theirs = load_dataset(
        str(folder), choice.get("subset"), split=choice.get("split", "train"), cache_dir=str(tmp_path / "cache")
    )
    found = read(folder, **choice)
    assert found == theirs["number"][:] and 9 not in found[:3]


TWO = "must be one of all, default"
REFUSED = {
    "configurations without a README": (CONFIGURATIONS, {}, f"subset=: {TWO}, the folders"),
    "configurations without a default": (
        {"README.md": readme(ALL, DEFAULT.replace("name: default", "name: small")), **CONFIGURATIONS},
        {},
        "subset=: must be one of all, small, the configurations",
    ),
    "two defaults": (
        {"README.md": readme(ALL + "\n  default: true", DEFAULT), **CONFIGURATIONS},
        {},
        f"subset=: {TWO}, the configurations",
    ),
    "a configuration that is none": (
        {"README.md": readme(ALL, DEFAULT), **CONFIGURATIONS},
        {"subset": "al"},
        f"subset=al: {TWO}",
    ),
    "a folder that is none": (CONFIGURATIONS, {"subset": "al"}, f"subset=al: {TWO}"),
    "a split that the README lacks": (
        {"README.md": readme(ALL), **CONFIGURATIONS},
        {"split": "test"},
        "split=test: must be one of train",
    ),
    "splits whose names begin alike": (
        {f"data/train_{kind}-00000-of-00001.parquet": parquet(1) for kind in ("sft", "gen")},
        {},
        "path=.*it holds data/train_gen-00000-of-00001.parquet, data/train_sft",
    ),
    "files of splits whose names begin alike": (
        {"train_sft.jsonl": lines(1), "train_gen.jsonl": lines(2)},
        {},
        "path=.*it holds train_gen.jsonl, train_sft.jsonl",
    ),
    "the split somewhere in the name": ({"gsm8k_train.jsonl": lines(1)}, {}, "path=.*it holds gsm8k_train.jsonl"),
    "no such split": ({"train.jsonl": lines(1)}, {"split": "test"}, "path=.*named test or test-.*it holds train.jsonl"),
    "the split as a name in another's folder": (
        {"train/test.jsonl": lines(1)},
        {"split": "test"},
        "path=.*it holds train/test.jsonl",
    ),
    "two names of a split": (
        {"valid.jsonl": lines(1), "dev.jsonl": lines(1)},
        {"split": "validation"},
        "split=validation: must be one of valid, dev",
    ),
    "nothing": ({}, {}, "path=.*it holds no such file"),
    "other formats": ({"train.tsv": b"number\n1\n"}, {}, "train.tsv: must be one of .jsonl"),
    "the rows in two formats": (
        {"train.jsonl": lines(1), "train.parquet": parquet(1)},
        {},
        "holds the split as .jsonl and as .parquet",
    ),
    "the rows packed and unpacked": (
        {"train.jsonl": lines(1), "train.jsonl.gz": gzip.compress(lines(1))},
        {},
        "holds the split as .jsonl and as .jsonl.gz",
    ),
    "a copy in another folder": (
        {"train.jsonl": lines(1), "backup/train.jsonl": lines(1)},
        {},
        "subset=: must be one of ., backup",
    ),
    "a shard that is missing": (
        {f"data/train-0000{n}-of-00003.jsonl": lines(n) for n in (0, 2)},
        {},
        "data: train-00001-of-00003 is missing",
    ),
    "a pattern without files": (
        {"README.md": readme(ALL, DEFAULT), "default/trains-0.jsonl": lines(1)},
        {},
        "README.md names default/train-",
    ),
    "a README that is no YAML": (
        {"README.md": b"---\nconfigs: [\n---\n", "train.jsonl": lines(1)},
        {},
        "README.md: its",
    ),
    "configurations without names": (
        {"README.md": readme("- data_files: x"), "train.jsonl": lines(1)},
        {},
        "README.md: its configs cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_clear_is_refused_with_what_it_holds(tmp_path, name):
    files, choice, reason = REFUSED[name]
    with pytest.raises(UserError, match=reason) as refused:
        read(folder_of(tmp_path, files), **choice)
    assert "\n" not in str(refused.value)


def test_a_folder_of_a_configuration_is_chosen_by_its_name(tmp_path):
    folder_of(tmp_path, CONFIGURATIONS)
    assert read(tmp_path, subset="all") == [1, 2, 3] and read(tmp_path, subset="default") == [1, 2]
    folder_of(tmp_path, {"data/all/train.jsonl": lines(4)})
    assert read(tmp_path, subset="data/all") == [4]


def test_no_file_is_read_twice(tmp_path):
    """A cache of the hub holds links to the files; a link to a folder may lead back."""
    blobs = folder_of(tmp_path / "blobs", {"a": lines(1), "b": lines(2)})
    folder = folder_of(tmp_path / "snapshot", {})
    (folder / "data").mkdir(parents=True)
    for name, blob in (("train-0", "a"), ("train-1", "b"), ("train-2", "a")):
        (folder / f"data/{name}.jsonl").symlink_to(blobs / blob)
    (folder / "data/again").symlink_to(folder)
    assert read(folder) == [1, 2]
    (folder / "data/train-3.jsonl").symlink_to(blobs / "gone")
    with pytest.raises(DataError, match=r"train-3\.jsonl: cannot be read"):
        read(folder)


def test_saved_datasets_are_read_by_their_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([{"number": number} for number in range(5)])
    DatasetDict(train=table, test=table.select([4])).save_to_disk(tmp_path / "both")
    table.save_to_disk(tmp_path / "alone", num_shards=2)
    Dataset.from_list([{"number": 7}], split="test").save_to_disk(tmp_path / "test")
    assert read(tmp_path / "both") == read(tmp_path / "alone") == [0, 1, 2, 3, 4]
    assert read(tmp_path / "both", split="test") == [4] and read(tmp_path / "test", split="test") == [7]
    for name, choice, reason in (
        ("both", {"split": "dev"}, "split=dev: must be one of train, test"),
        ("alone", {"split": "test"}, "split=test: must be train"),
        ("test", {}, "split=train: must be test"),
        ("both", {"subset": "all"}, "subset=all: must be empty"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read(tmp_path / name, **choice)
    next((tmp_path / "alone").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"not all the files that state\.json names"):
        read(tmp_path / "alone")


def test_rows_tell_their_place(tmp_path):
    folder_of(tmp_path, {"a/train-0.jsonl": lines(1, 2), "a/train-1.jsonl": b"\n" + lines(3)})
    rows = list(rows_of(RowSource(tmp_path).files()))
    assert [row.location for row in rows] == [
        f"{tmp_path}/a/train-{place}" for place in ("0.jsonl:1", "0.jsonl:2", "1.jsonl:2")
    ]
    assert [row.id for row in rows] == ["train-0.jsonl:1", "train-0.jsonl:2", "train-1.jsonl:2"]
    assert [row.id for row in rows_of([tmp_path / "a/train-1.jsonl"])] == ["2"]
