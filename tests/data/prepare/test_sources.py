"""Rows of JSONL, text and Parquet: every row once whatever the pieces, and each bad one named by its line."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.data.prepare.sources import input_files, read, scan
from megatron_r1.errors import ConfigError, DataError
from tests.support.row_files import FILES, ROWS

BAD_LINES = [
    (b"not json", "is not JSON (invalid literal"),
    (b'{"text": "a"', "is not JSON ("),
    (b'["text"]', "is not a JSON object"),
    (b'"text"', "is not a JSON object"),
    (b"null", "is not a JSON object"),
    (b'{"other": "a"}', "field text is missing"),
    (b'{"text": 5}', "field text is not text"),
    (b'{"text": null}', "field text is not text"),
    (b'{"text": " \\n"}', "has no text"),
    (b'{"text": "\xff"}', "is not JSON ("),
    (b'{"text": "\\ud800"}', "is not JSON ("),
]


def rows_of(path, target, fields=("text",)):
    return [row for span in scan(str(path), 3, target).spans for row in read(str(path), span, fields)]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.text(min_size=1).filter(str.strip), max_size=30), st.integers(1, 400), st.booleans())
def test_every_line_is_read_once_whatever_the_pieces(tmp_path_factory, texts, target, last_break):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    path.write_bytes((lines + "\n" * (last_break and bool(texts))).encode())
    found = scan(str(path), 0, target)
    assert sum(span.size for span in found.spans) == path.stat().st_size
    rows = rows_of(path, target)
    assert [(row.number, row.text, row.problem) for row in rows] == [(n, text, "") for n, text in enumerate(texts, 1)]
    if len(lines) > 3 * target + 200 and max(map(len, texts)) < 20:
        assert len(found.spans) > 1


@pytest.mark.parametrize("target", [1, 30, 10**6])
def test_bad_lines_are_named(tmp_path, target):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + b"".join(line + b"\n" for line, _ in BAD_LINES) + b'{"text": "end"}')
    rows = rows_of(path, target)
    assert (rows[0].text, rows[-1].text, rows[-1].number) == ("good", "end", len(BAD_LINES) + 2)
    for (_, problem), row in zip(BAD_LINES, rows[1:-1], strict=True):
        assert row.problem.startswith(problem) and row.source == 3


def test_fields_are_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a?", "a": "b"}\n{"q": "c?"}\n')
    good, bad = rows_of(path, 100, ("q", "a"))
    assert good.text == "a?\nb" and bad.problem == "field a is missing"


def test_a_text_file_is_one_row(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\u4e09".encode())
    assert [(row.number, row.text) for row in rows_of(path, 2)] == [(1, "one\r\ntwo\n\u4e09")]
    path.write_bytes(b"one\xff")
    assert [row.problem for row in rows_of(path, 2)] == ["is not UTF-8 at byte 3"]
    path.write_bytes(b"")
    assert [row.problem for row in rows_of(path, 2)] == ["has no text"]


def test_parquet_rows_are_read_group_by_group(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*"abcde", None, ""], "n": range(7)})
    parquet.write_table(table, path, row_group_size=2)
    assert len(scan(str(path), 0, 1).spans) == 4
    rows = rows_of(path, 1)
    assert [(row.number, row.text) for row in rows if not row.problem] == list(enumerate("abcde", 1))
    assert [row.problem for row in rows[5:]] == ["field text is not text", "has no text"]
    assert {row.problem for row in rows_of(path, 1, ("gone",))} == {"field gone is missing"}
    path.write_bytes(b"PAR1 this is none PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file"):
        scan(str(path), 0, 1)


def test_unknown_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.tsv: must be a file \(\.jsonl, .*, or \.txt\)"):
        scan(str(tmp_path / "a.tsv"), 0, 1)
    for suffix in ("jsonl", "txt", "parquet"):
        with pytest.raises(DataError, match=rf"gone\.{suffix}: cannot be read"):
            scan(str(tmp_path / f"gone.{suffix}"), 0, 1)


@pytest.mark.parametrize("target", [1, 20, 10**6])
@pytest.mark.parametrize("name", FILES)
def test_every_form_of_a_file_gives_its_texts(tmp_path, name, target):
    """The file's mark costs no document, and blank lines are none; whatever the pieces."""
    path = tmp_path / name
    path.write_bytes(FILES[name])
    rows = rows_of(path, target)
    assert [row.text for row in rows] == [row["text"] for row in ROWS] and not any(row.problem for row in rows)


def test_rows_have_the_numbers_of_their_lines_whatever_the_pieces(tmp_path):
    path = tmp_path / "a.jsonl"
    line = b'{"text": "a"}'
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r" + line + b"\n\n" + line + b"\r\r\n" + line)
    for target in range(1, 90):
        assert [row.number for row in rows_of(path, target)] == [1, 3, 4, 6, 8]


def test_a_text_file_loses_its_mark_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ufeff\r\n".encode())
    assert [row.text for row in rows_of(path, 2)] == ["one\ufeff\r\n"]
    path.write_bytes("one".encode("utf-16"))
    assert [row.problem for row in rows_of(path, 2)] == ["is not UTF-8 at byte 0"]


def test_inputs_may_be_folders(tmp_path):
    for name in ("data/train-1.jsonl", "data/train-0.jsonl", "data/test.jsonl", ".hidden/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(FILES["plain.jsonl"])
    found = input_files(["a.txt", str(tmp_path)], "train", "", "inputs")
    assert found == ("a.txt", f"{tmp_path}/data/train-0.jsonl", f"{tmp_path}/data/train-1.jsonl")
    with pytest.raises(ConfigError, match=r"^inputs=.*: must hold a saved dataset"):
        input_files([str(tmp_path)], "validation", "", "inputs")
