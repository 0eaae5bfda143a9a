"""Examples from JSON lines files, and other JSON: what training, evaluation and ensembles read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .examples import ASKED, PAIRS, TEXTS, Example, as_example, as_prompt
from .listing import listed
from .other_formats import binary_kind, text_kind

MAX_LISTED = 20  # bad lines that are shown


def read_rows(path: Path, *, text: bool = False) -> list[Example]:
    """The rows of a file in the forms of `as_example`, each with "input" and "target"; with `text` also {"text": str}.

    One ValueError for a file that is not there or has no rows, or with every bad line.
    """
    expected = f"JSON lines {TEXTS if text else PAIRS}"
    expect_file(path, expected)
    if (kind := binary_kind(path)) is not None:
        raise ValueError(f"{path} looks like {kind}; what is read are {expected}")
    found = read_text(path)
    if (kind := _no_json(found, path, texts=text)) is not None:
        raise ValueError(f"{path} looks like {kind}; what is read are {expected}")
    return _rows(found, path, lambda row: as_example(row, text=text))


def read_prompts(path: Path | None) -> list[Example]:
    """What is to be answered, of a file or (None) of standard input: JSON lines in the forms of `as_prompt`, where the
    first line is a JSON object; else every line that is not empty is a prompt, none of them a row. One ValueError as
    `read_rows`.
    """
    if path is not None:
        expect_file(path, f"a prompt in every line, or JSON lines {ASKED}")
    if path is not None and (kind := binary_kind(path)) is not None:
        raise ValueError(
            f"{path} looks like {kind}; what is read are prompts, one in every line, or JSON lines {ASKED}"
        )
    text = sys.stdin.read().removeprefix("\ufeff") if path is None else read_text(path)
    lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
    if not lines or _is_object(lines[0]) or "{" in text and _document(text) is not None:
        return _rows(text, path or "standard input", as_prompt)
    if (number := next((n for n, line in enumerate(text.split("\n"), 1) if _asks(line)), None)) is not None:
        raise ValueError(
            f"{path or 'standard input'} cannot be used, its lines are not alike: its first one is no JSON and line "
            f"{number} is a row: expected a prompt in every line, or JSON lines {ASKED}"
        )
    return [Example(input=line) for line in lines]


def expect_file(path: Path, expected: str) -> None:
    """ValueError, with what was expected and the files that there are, for a path that is no file."""
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in (".json", ".jsonl"))
        held = f"; it holds {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}" if inside else ""
        raise ValueError(f"{path} is a folder, expected a file: {expected}{held}")
    if not path.is_file():
        lost = "" if path.parent.is_dir() else f", nor its folder {path.parent}"
        raise ValueError(f"there is no file {path}{lost}: expected {expected}")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; JSONDecodeError also for what Python has no room for: deep nesting and long numbers."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"
        raise json.JSONDecodeError(what, "", 0) from None


def _document(text: str) -> str | None:
    """What a text is that is JSON as a whole and no row: a list, or an object over several lines; None for others."""
    try:
        whole = parse_json(text)
    except json.JSONDecodeError:
        return None
    if isinstance(whole, list):
        return f"a list of {len(whole)}"
    return f"an object with {len(whole)} keys" if isinstance(whole, dict) and "\n" in text.strip() else None


def _no_json(text: str, path: Path, *, texts: bool) -> str | None:
    """What a text is of which no line is JSON; None for JSON lines, if only one, and for JSON over several lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or any(map(_is_json, lines)) or lines[0].lstrip()[0] in "{[":
        return None
    return text_kind(text, path, texts=texts)


def _is_json(line: str) -> bool:
    try:
        parse_json(line)
    except json.JSONDecodeError:
        return False
    return True


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_json(line), dict)
    except json.JSONDecodeError:
        return False


def _asks(line: str) -> bool:
    """Whether a line is a row that could be answered."""
    try:
        as_prompt(parse_json(line))
    except ValueError:
        return False
    return True


def _rows(text: str, path: Path | str, read: Callable[[Any], Example]) -> list[Example]:
    """Every line of JSON as `read` takes it; a text in it may hold what other systems take for line ends."""
    rows, causes, first = [], {}, None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            rows.append(read(row))
        except ValueError as error:
            wrong = f"not JSON ({error.msg})" if isinstance(error, json.JSONDecodeError) else str(error)
            causes.setdefault(wrong, []).append(number)
        else:
            first = (number, row) if first is None and not causes else first
    if not rows and not causes:
        causes["the file has no rows"] = []
    if causes and (document := _document(text)) is not None:
        raise ValueError(
            f"{path} is one JSON document ({document}), not JSON lines: expected one object a line, such as "
            f"`jq -c '.[]' {path}` makes of a list"
        )
    if causes:
        problems = [f"{_lines(numbers)}{cause}" for cause, numbers in causes.items()]
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(
            f"{path} cannot be used{_differs(first, causes)}:\n- " + "\n- ".join(problems[:MAX_LISTED] + more)
        )
    return rows


def _lines(numbers: list[int]) -> str:
    """The lines that have a problem, as its beginning."""
    return f"line{'s' * (len(numbers) > 1)} {listed([str(number) for number in numbers])}: " if numbers else ""


def _differs(first: tuple[int, Any] | None, causes: dict[str, list[int]]) -> str:
    """Where a file ceases to be what its first row is."""
    if first is None:
        return ""
    keys = ", ".join(map(repr, first[1]))
    return f" (line {min(map(min, causes.values()))} is the first that is not like line {first[0]}, of {keys})"


def read_json(path: Path, expected: str) -> Any:
    """What a JSON file holds; ValueError, naming the file, when it is not there or not JSON."""
    expect_file(path, expected)
    try:
        return parse_json(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected {expected}") from error


def read_text(path: Path) -> str:
    """The file's text, without the mark that some editors begin it with; ValueError, with its name, if not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
