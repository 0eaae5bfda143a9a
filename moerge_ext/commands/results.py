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
from .meaning import meant, relative

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
    "writer_timeout",
    "judge_timeout",
)


def check_results(args: argparse.Namespace, name: str, grows: Sequence[str] = ()) -> None:
    """ValueError where `name` in --output is of arguments that mean something else than these, of which `grows` may
    have become more."""
    file = args.output / name
    if args.overwrite or not file.exists():
        return
    noted = ASKED.format(args.command)
    here, there = _noted(args), _earlier(args.output / noted)
    if there is None:
        check_replaced(file, f"of arguments that are not known ({noted} beside it would say them)")
        return
    # where the results lie: arguments that were moved together with them are what they were
    both = [(there["meant"], here["meant"])]
    both.append(tuple(relative(side["meant"], side["in"]) for side in (there, here)))
    other = {key for key in {*here["meant"], *there["meant"]} if not any(_alike(key, *pair, grows) for pair in both)}
    if other:
        said = "; ".join(_difference(key, there, here) for key in sorted(other))
        check_replaced(file, f"of other arguments ({said})")


def _alike(key: str, there: dict[str, Any], here: dict[str, Any], grows: Sequence[str]) -> bool:
    if key in grows and _among(there.get(key), here.get(key)):
        return True
    return (here.get(key) or None) == (there.get(key) or None)


def _difference(key: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    """As they were typed, or where that is the same, what it means."""
    kind = "asked" if there["asked"].get(key) != here["asked"].get(key) else "meant"
    return f"{_flag(key)}: {_text(there[kind].get(key))} there, {_text(here[kind].get(key))} here"


def keep_arguments(args: argparse.Namespace) -> Path:
    """Note what the tables in --output are of."""
    file, text = args.output / ASKED.format(args.command), json.dumps(_noted(args), indent=1, sort_keys=True)
    write_atomically(file, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    return file


def _noted(args: argparse.Namespace) -> dict[str, Any]:
    """asked: the arguments as they were typed; meant: what they mean; in: the folder of the results."""
    given = {key: value for key, value in vars(args).items() if key not in APART}
    asked = json.loads(json.dumps(given, default=str))
    return {"asked": asked, "meant": meant(asked), "in": str(args.output.resolve())}


def _earlier(file: Path) -> dict[str, Any] | None:
    try:
        found = read_json(file, "the arguments of an earlier call")
    except (ValueError, OSError):
        return None
    fine = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("asked", "meant"))
    return found if fine and isinstance(found.get("in"), str) else None


def _among(there: Any, here: Any) -> bool:
    """Whether what was asked for is asked for again: all of a list, or nothing was."""
    there, here = ([value] if isinstance(value, str) else value or [] for value in (there, here))
    return {*map(str, there)} <= {*map(str, here)}


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


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
