"""A file that holds no JSON lines: what it is instead, and a line of the shell that makes JSON lines of it."""

from __future__ import annotations

import csv
import os
import re
from pathlib import Path
from shlex import quote

# the first bytes of a file: what it is, and, where a library reads that, its name in `datasets`
MAGIC = {
    b"PAR1": ("Parquet", "parquet"),
    b"ARROW1": ("Arrow", "arrow"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet (.xlsx)", None),
    b"\x1f\x8b": ("a file compressed by gzip: unpack it first", None),
    b"BZh": ("a file compressed by bzip2: unpack it first", None),
    b"\x28\xb5\x2f\xfd": ("a file compressed by zstd: unpack it first", None),
    b"SQLite format 3": ("an SQLite database", None),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet or document of old Office", None),
    b"\xff\xfe": ("UTF-16 text: save it as UTF-8", None),
    b"\xfe\xff": ("UTF-16 text: save it as UTF-8", None),
}
SEPARATED = {",": "CSV", "\t": "TSV", ";": "CSV (with semicolons)"}
PAIR = ("input", "target")
LOOKED_AT = 20  # lines
_SAFE = re.compile(r"[\w ./:;,?#()*+=&<>@-]+")  # a name that means nothing to a shell, nor to Python, between quotes
_SENTENCE = re.compile(r".*[.!?]\W*")
LONG = 4  # words: more than the name of a column has
TABLES = (".csv", ".tsv")


def binary_kind(path: Path) -> str | None:
    """What a file is by its first bytes, with the way to JSON lines; None for what may be text."""
    with open(path, "rb") as opened:
        first = opened.read(16)
    for magic, (kind, library) in MAGIC.items():
        if first.startswith(magic):
            if library is None or not _SAFE.fullmatch(str(path)):
                return kind
            rows = f"datasets.load_dataset('{library}', data_files='{path}')['train']"
            code = f"import datasets; {rows}.to_json('{_beside(path)}')"
            return f'{kind}; JSON lines of it: python -c "{code}" (pip install datasets)'
    return None


def text_kind(text: str, path: Path, *, texts: bool) -> str:
    """What a text is of which no line is JSON; texts: whether rows of {"text"} are read."""
    lines = [line for line in text.split("\n") if line.strip()]
    told = _plain(path) if texts else "plain text"
    for separator, name in SEPARATED.items():
        if columns := _columns(lines, separator):
            if path.suffix in TABLES:
                return _table(columns, separator, name, path)
            if _prose(columns):
                return f"{told}; if it is {name}, call it {path.with_suffix('.csv').name}"
            return _table(columns, separator, name, path) + (f"; or like {told}" if texts else "")
    return told


def _table(columns: list[str], separator: str, name: str, path: Path) -> str:
    """What a table is, with its first two columns, or "input" and "target", as JSON lines."""
    asked, answer = PAIR if set(PAIR) <= set(columns) else columns[:2]
    told = f"{name} with the columns {', '.join(columns)}"
    if not all(map(_SAFE.fullmatch, (asked, answer, str(path)))):
        return f"{told} (called by letters, digits and _ alone, with a line of the shell that makes JSON lines of it)"
    options = "" if separator == "," else f", delimiter={separator!r}"
    row = f"dict(input=r['{asked}'], target=r['{answer}'])"
    return told + _made(row, f"csv.DictReader(sys.stdin{options})", path)


def _plain(path: Path) -> str:
    """Plain text, with its lines as rows."""
    if not _SAFE.fullmatch(str(path)):
        return "plain text"
    return f"plain text{_made('dict(text=r.rstrip())', 'sys.stdin if r.strip()', path)} (a row of every line)"


def _prose(columns: list[str]) -> bool:
    """Whether the first line of what could be a table is rather a sentence with commas."""
    return _SENTENCE.fullmatch(columns[-1]) is not None or any(len(name.split()) > LONG for name in columns)


def _columns(lines: list[str], separator: str) -> list[str]:
    """The names in the first line of a table with this separator; empty where it is none."""
    try:
        rows = list(csv.reader(lines[:LOOKED_AT], delimiter=separator))
    except csv.Error:
        return []
    first, *rest = rows[:-1] if len(lines) > LOOKED_AT else rows  # a field of several lines may be cut off
    named = all(name.strip() and len(name) < 60 for name in first)
    return first if len(first) > 1 and named and rest and all(len(row) == len(first) for row in rest) else []


def _made(row: str, rows: str, path: Path) -> str:
    code = f"import csv, json, sys; [print(json.dumps({row})) for r in {rows}]"
    return f'; JSON lines of it: python -c "{code}" < {quote(str(path))} > {quote(str(_beside(path)))}'


def _beside(path: Path) -> Path:
    """Where the JSON lines of a file go: never into what is there."""
    stem = path.with_suffix("")
    names = [f"{stem}.jsonl", f"{stem}-rows.jsonl", *(f"{stem}-rows-{n}.jsonl" for n in range(2, 100))]
    return next((Path(name) for name in names if not os.path.lexists(name)), Path(f"{stem}-rows-100.jsonl"))
