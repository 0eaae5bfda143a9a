"""--model, the same in every command: the base by name, and where a command had it by place, by place as well."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

MODEL = "folder or hub id of the base model, with its tokenizer"


def add_model(parser: Any, *, required: bool = True, more: str = "", text: str = MODEL) -> None:
    """Declare --model. more: what the command does with it, where it is not what all do."""
    parser.add_argument("--model", required=required, type=a_place, metavar="DIR", help=text + more)


def add_placed_model(
    parser: argparse.ArgumentParser, second: str | None = None, *, place: str = "MODEL", text: str = MODEL
) -> None:
    """Declare `place`, the model by place, and --model; one of them must be given.

    second: the argument that comes by place after it, required and declared by the command after this; `main` calls the
    `settle` that is set here.
    """
    parser.add_argument("placed", nargs="?", type=a_place, metavar=place, help=f"{text}; or by name, as --model")
    add_model(parser, required=False, text=text)
    parser.set_defaults(settle=partial(_settle, place, second))


def a_place(text: str) -> str:
    """The text, with the home folder for a ~ that the shell left, as in --model=~/base."""
    return os.path.expanduser(text)


def _settle(place: str, second: str | None, args: argparse.Namespace, refuse: Callable[[str], Any]) -> None:
    """Sorts out which words are what: argparse gives the second the first word where options stand between the two."""
    if any(word.startswith("-") and word != "-" for word in args.rest):
        return  # an option that is not known is said first
    words = [vars(args).pop("placed"), *([getattr(args, second)] if second else ())]
    words = [word for word in words if word is not None] + args.rest
    expected = [*([] if args.model is not None else [place]), *([second.upper()] if second else [])]
    if args.model is not None and len(words) > len(expected):
        refuse(f"the model is given twice: {words[0]!r} by place, and --model {args.model!r}")
    if len(words) < len(expected):
        ways = f"{' '.join(expected)}, or --model DIR{f' and {second.upper()}' if second else ''}"
        refuse(f"no model is given: expected {ways}" + (f"; got {words[0]!r} alone" if words else ""))
    if args.model is None:
        args.model = a_place(words.pop(0))
    if second:
        setattr(args, second, words.pop(0))
    args.rest = words
