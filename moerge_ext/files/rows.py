"""Examples from JSON lines files, and other JSON: what training, evaluation and ensembles read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .examples import PAIRS, TEXTS, Example, as_example

MAX_LISTED = 20  # bad lines that are shown


def read_rows(path: Path, *, text: bool = False) -> list[Example]:
    """The rows of a file in the forms of `as_example`, each with "input" and "target"; with `text` also {"text": str}.

    One ValueError for a file that is not there or has no rows, or with every bad line.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected JSON lines {TEXTS if text else PAIRS}")
    rows, problems = [], []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        try:
            rows.append(as_example(row, text=text))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not rows and not problems:
        problems.append("the file has no rows")
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems[:MAX_LISTED] + more))
    return rows


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; ValueError, naming the file, when it is not there or not JSON."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected {expected}")
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected {expected}") from error


def read_text(path: Path) -> str:
    """The file's text; ValueError, naming the file, when it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
