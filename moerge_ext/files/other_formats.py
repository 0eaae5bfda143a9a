"""A file that holds no JSON lines: what it is instead, and a line of the shell that makes JSON lines of it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

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
_PLAIN = re.compile(r"[\w./-]+")  # a name that means nothing to a shell


def binary_kind(path: Path) -> str | None:
    """What a file is by its first bytes, with the way to JSON lines; None for what may be text."""
    with open(path, "rb") as opened:
        first = opened.read(16)
    for magic, (kind, library) in MAGIC.items():
        if first.startswith(magic):
            if library is None or not _PLAIN.fullmatch(str(path)):
                return kind
            rows = f"datasets.load_dataset('{library}', data_files='{path}')['train']"
            code = f"import datasets; {rows}.to_json('{_beside(path)}')"
            return f'{kind}; JSON lines of it: python -c "{code}" (pip install datasets)'
    return None


def text_kind(text: str, path: Path, *, texts: bool) -> str:
    """What a text is of which no line is JSON; texts: whether rows of {"text"} are read."""
    lines = [line for line in text.split("\n") if line.strip()]
    for separator, name in SEPARATED.items():
        if columns := _columns(lines, separator):
            asked, answer = PAIR if set(PAIR) <= set(columns) else columns[:2]
            options = "" if separator == "," else f", delimiter={separator!r}"
            row = f"dict(input=r['{asked}'], target=r['{answer}'])"
            made = _made(row, f"csv.DictReader(sys.stdin{options})", path)
            plain = all(map(_PLAIN.fullmatch, (asked, answer, str(path))))
            return f"{name} with the columns {', '.join(columns)}{made if plain else ''}"
    if texts and _PLAIN.fullmatch(str(path)):
        made = _made("dict(text=r.rstrip())", "sys.stdin if r.strip()", path)
        return f"plain text{made} (a row of every line)"
    return "plain text"


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
    return f'; JSON lines of it: python -c "{code}" < {path} > {_beside(path)}'


def _beside(path: Path) -> Path:
    """Where the JSON lines of a file go: never into itself."""
    return path.with_name(f"{path.stem}-rows.jsonl") if path.suffix == ".jsonl" else path.with_suffix(".jsonl")
