"""The same rows in files of every form."""

from __future__ import annotations

import gzip
import json

ROWS = [{"text": "eins"}, {"text": "zwei \u2028 \u95ee"}, {"text": "drei"}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
ARRAY = b"[" + b", ".join(LINES) + b"]"
MARK = b"\xef\xbb\xbf"

FILES = {
    "plain.jsonl": b"\n".join(LINES),
    "end.jsonl": b"\n".join(LINES) + b"\n",
    "crlf.jsonl": b"\r\n".join(LINES) + b"\r\n",
    "cr.jsonl": b"\r".join(LINES) + b"\r",
    "ends.jsonl": LINES[0] + b"\r\n" + LINES[1] + b"\n" + LINES[2],
    "mark.jsonl": MARK + b"\n".join(LINES),
    "mark-crlf.ndjson": MARK + b"\r\n".join(LINES),
    "blank.jsonl": b"\n" + LINES[0] + b"\n\n \t\n" + LINES[1] + b"\n" + LINES[2] + b"\n\n",
    "blank-crlf.jsonl": b"\r\n\r\n".join(LINES),
    "lines.json": b"\n".join(LINES),
    "array.json": ARRAY,
    "array.jsonl": b"\n " + ARRAY + b"\n",
    "mark-array.json": MARK + ARRAY,
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "packed.jsonl.gz": gzip.compress(b"\n".join(LINES)),
    "packed-mark.jsonl.gz": gzip.compress(MARK + b"\n".join(LINES)),
    "packed-array.json.gz": gzip.compress(ARRAY),
    "packed-unnamed.jsonl": gzip.compress(b"\n".join(LINES)),
    "packed-twice.jsonl.gz": gzip.compress(LINES[0] + b"\n") + gzip.compress(b"\n".join(LINES[1:])),
}
