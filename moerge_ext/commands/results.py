"""Tables that an earlier call left in the folder: replaced where nothing of them is lost, else by --overwrite alone."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from ..files.kept import check_replaced
from ..files.rows import read_json

ASKED = "asked.{}.json"  # the arguments that the tables of a command beside it are of
# on which no number of a table depends
APART = (
    "command",
    "words",
    "rest",
    "output",
    "overwrite",
    "no_progress",
    "batch_size",
    "device",
    "cost",
    "html",
    "view",
)


def check_results(args: argparse.Namespace, name: str, grows: Sequence[str] = ()) -> None:
    """ValueError where `name` in --output is of other arguments than these, of which `grows` may have become more."""
    file = args.output / name
    if args.overwrite or not file.exists():
        return
    noted = ASKED.format(args.command)
    here, there = _asked(args), _earlier(args.output / noted)
    if there is None:
        check_replaced(file, f"of arguments that are not known ({noted} beside it would say them)")
        return
    more = {key for key in grows if _among(there.get(key), here[key])}
    other = sorted(key for key in {*here, *there} - more if (here.get(key) or None) != (there.get(key) or None))
    if other:
        said = "; ".join(f"{_flag(key)}: {_text(there.get(key))} there, {_text(here.get(key))} here" for key in other)
        check_replaced(file, f"of other arguments ({said})")


def keep_arguments(args: argparse.Namespace) -> Path:
    """Note what the tables in --output are of."""
    file, text = args.output / ASKED.format(args.command), json.dumps(_asked(args), indent=1, sort_keys=True)
    write_atomically(file, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return file


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    given = {key: value for key, value in vars(args).items() if key not in APART}
    return json.loads(json.dumps(given, default=str))


def _earlier(file: Path) -> dict[str, Any] | None:
    try:
        found = read_json(file, "the arguments of an earlier call")
    except (ValueError, OSError):
        return None
    return found if isinstance(found, dict) else None


def _among(there: Any, here: Any) -> bool:
    """Whether what was asked for is asked for again: all of a list ("a,b" is one), or nothing was."""
    there, here = (value.split(",") if isinstance(value, str) else value or [] for value in (there, here))
    return {*map(str, there)} <= {*map(str, here)}


def _flag(key: str) -> str:
    return key if key in ("model", "folder") else f"--{key.replace('_', '-')}"


def _text(value: Any) -> str:
    if value in (None, [], ""):
        return "not given"
    return (
        shlex.join(map(str, value))
        if isinstance(value, list)
        else repr(value)
        if isinstance(value, str)
        else f"{value}"
    )
