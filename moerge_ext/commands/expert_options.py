"""The options that say which experts a command loads, the same in every command; and how one of them is named."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..experts.bank import ExpertBank


def add_gates(parser: Any) -> None:
    """Declare --gates."""
    parser.add_argument(
        "--gates",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="gates (and indexed examples) of one expert that lie elsewhere than beside it: folder, file or hub id, as "
        "`train-gates --output DIR` writes; repeatable",
    )


def gates_of(args: argparse.Namespace) -> dict[str, str]:
    """{expert: folder} of --gates; ValueError for what is not NAME=DIR, and for a name given twice."""
    return pairs(args.gates, "--gates", "DIR")


def pairs(texts: list[str], option: str, value: str) -> dict[str, str]:
    """{name: text} of an option that takes NAME=`value`."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not (name and equals and rest):
            raise ValueError(f"{option} takes NAME={value}, got {text!r}")
        if name in found:
            raise ValueError(f"{option} {name}=... is given twice: {found[name]!r} and {rest!r}")
        found[name] = rest
    return found


def load_bank(args: argparse.Namespace) -> ExpertBank:
    """The experts of --experts with the gates of --gates, for --model."""
    from ..experts.bank import load_experts

    return load_experts(args.experts, base=args.model, gates=gates_of(args))
