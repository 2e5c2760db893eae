"""Files of rows as `datasets` reads them: marks, blank lines, line ends, arrays, gzip; what is none is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.data.row_files import BadRow, is_row_file, rows_of
from megatron_r1.errors import DataError
from tests.support.row_files import ARRAY, FILES, LINES, MARK, ROWS


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def contents(path: Path) -> list:
    return [row.content for row in rows_of([path])]


@pytest.mark.parametrize("name", FILES)
def test_one_file_has_the_same_rows_in_every_form(tmp_path, name):
    assert contents(written(tmp_path, name, FILES[name])) == ROWS


def test_rows_are_those_of_datasets(tmp_path):
    from datasets import load_dataset

    files = {f"s{number}": str(written(tmp_path, name, FILES[name])) for number, name in enumerate(FILES)}
    theirs = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert all(list(theirs[split]) == ROWS for split in files)


def test_tables_have_the_same_rows(tmp_path):
    import pyarrow
    from datasets import Dataset
    from pyarrow import feather, parquet

    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    feather.write_feather(table, tmp_path / "file.arrow", "uncompressed")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "file.arrow", *tmp_path.glob("saved/*.arrow")):
        assert [(row.id, row.content) for row in rows_of([path])] == list(zip("123", ROWS, strict=True))


def test_csv_has_text_with_quotes_and_line_ends(tmp_path):
    text = 'a,"b c"\r\n1,"two\n""lines"""\r\n\r\n3\r\n,\u00e9\r\n'
    rows = list(rows_of([written(tmp_path, "a.csv", MARK + text.encode())]))
    assert [row.id for row in rows] == ["1", "2", "3"]
    assert rows[0].content == {"a": "1", "b c": 'two\n"lines"'} and rows[2].content == {"a": "", "b c": "\u00e9"}
    assert isinstance(rows[1].content, BadRow) and str(rows[1].content) == "has 1 values for 2 fields"


MIXED = [
    {"a": 5, "m": [{"role": "user", "content": "x"}, {"role": "tool", "content": ["y"]}], "s": {"t": None}},
    {"a": "six", "m": None, "s": {"t": 7}},
    {"a": None, "m": [], "s": None},
    {"a": {"b": [1]}, "m": [{"role": "user", "content": None}], "s": {"t": "u"}},
    {"a": "x y", "m": [{"role": "user", "content": {"z": 1}}], "s": {"t": [8]}},
]


def test_columns_of_mixed_types_are_read_as_datasets_reads_them(tmp_path):
    from datasets import load_dataset

    lines = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, MIXED)).encode())
    table = load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(table.features["a"])
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "a.parquet") == list(table) == MIXED
    assert contents(next(tmp_path.glob("saved/*.arrow"))) == MIXED


def test_rows_have_the_numbers_of_their_lines(tmp_path):
    path = written(tmp_path, "a.jsonl", MARK + b'\n{"a": 1}\r\n\r\n{"a": 2}\r{broken\r\r{"a": 3}')
    assert [row.location for row in rows_of([path])] == [f"{path}:{number}" for number in (2, 4, 5, 7)]
    assert [isinstance(row.content, BadRow) for row in rows_of([path])] == [False, False, True, False]


@pytest.mark.parametrize("form", ["{0}", "[{0}]"])
@pytest.mark.parametrize("number", [10**20, -(10**30), 2**64, 2**63, 12345678901234567890123])
def test_integers_keep_every_digit(tmp_path, form, number):
    path = written(tmp_path, "a.json", form.format(json.dumps({"answer": number})).encode())
    assert contents(path) == [{"answer": number}]


REFUSED = {
    "utf16.jsonl": (LINES[0].decode().encode("utf-16"), "is UTF-16, not UTF-8"),
    "utf16be.jsonl": (b"\xfe\xff" + LINES[0].decode().encode("utf-16-be"), "is UTF-16, not UTF-8"),
    "utf32.jsonl": (b"\x00\x00\xfe\xff" + LINES[0].decode().encode("utf-32-be"), "is UTF-32, not UTF-8"),
    "cut.json": (ARRAY[:-5], "begins as a JSON array and is no whole one"),
    "cut.jsonl.gz": (gzip.compress(b"\n".join(LINES * 99))[:-30], "is not a whole gzip file"),
    "spoilt.jsonl.gz": (FILES["packed.jsonl.gz"][:20] + b"\xff" * 40, "is not a whole gzip file"),
    "object.json": (json.dumps({"data": ROWS}, indent=1).encode(), "holds an object over many lines"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
    "none.parquet": (b"PAR1 none PAR1", "is not a Parquet file"),
    "none.arrow": (b"ARROW1\0\0 none", "is not an Arrow file"),
    "open.csv": (b'a,b\n1,"two', "is no CSV file in UTF-8, or is no whole one"),
    "latin.csv": (b"a,b\n1,\xe9\n", "is no CSV file in UTF-8, or is no whole one"),
    "twice.csv": (b"a,a\n1,2\n", "its first row must name every field, each once"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, name):
    content, reason = REFUSED[name]
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as refused:
        list(rows_of([path]))
    assert str(refused.value).startswith(f"{path}: {reason}") and "\n" not in str(refused.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError, match=f"^{path}: cannot be read"):
            list(rows_of([path]))


def test_names_tell_what_can_be_read():
    read = ("a.jsonl", "a.b.json", "a.ndjson", "a.json.gz", "a.parquet", "a.arrow", "a.csv")
    assert all(is_row_file(Path(name)) for name in read)
    unread = ("a", "a.txt", "a.tsv", "a.csv.gz", "a.gz", "a.parquet.gz", "a.jsonl.zst")
    assert not any(is_row_file(Path(name)) for name in unread)
