"""The options that say which experts a command loads, the same in every command; and how one of them is named."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .named_dirs import named_dirs, split_name

if TYPE_CHECKING:
    from ..evaluation.runs import Run
    from ..experts.bank import ExpertBank


def add_experts(parser: Any, *, required: bool = True) -> None:
    """Declare --experts, without which most commands have nothing to do."""
    parser.add_argument(
        "--experts",
        required=required,
        default=None if required else [],
        nargs="+",
        action="extend",
        metavar="DIR",
        help="PEFT folders or hub ids (user/repo[/sub][@rev]), NAME=DIR to name one; can be repeated",
    )


def experts_of(args: argparse.Namespace) -> list[str] | dict[str, str]:
    """What `load_experts` gets of --experts: {name: folder} where some have a name. ValueError for a name twice."""
    from ..experts.hub import default_name

    return named_dirs(args.experts, "--experts", default_name)


def add_selection(parser: Any, *, dtype: bool = True) -> None:
    """Declare what `load_bank` takes of --experts. dtype: whether their type is chosen."""
    add = parser.add_argument_group("what is taken of the experts").add_argument
    add("--names", nargs="+", action="extend", metavar="NAME", help="only these of --experts, in this order")
    add("--modules", metavar="PATTERN", help="only these modules of theirs: a regular expression (default: all)")
    add(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="a part OLD of the modules' paths, between dots, is NEW on this model; =NEW is put before all; repeatable",
    )
    if dtype:
        add("--expert-dtype", choices=("float32", "bfloat16", "float16"), help="of the experts (default: as stored)")


def selection_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `load_experts` takes of `add_selection`, but for the type."""
    return {"names": args.names, "modules": args.modules, "rename": renames(args.rename) or None}


def left_out_note(text: str, said: dict[str, Any]) -> str:
    """What to add to the error `text` of a call that names experts which its --names leaves out; often nothing.

    said: the arguments by their names.
    """
    from ..experts.hub import default_name

    if not (said.get("names") and said.get("experts")):
        return ""
    given = [name or default_name(folder) for name, folder in map(split_name, said["experts"])]
    if not {*said["names"]} <= {*given}:  # which is what is wrong
        return ""
    left = [name for name in dict.fromkeys(given) if name not in said["names"] and _names(text, name)]
    return f"\n(--names leaves out {', '.join(left)})" if left else ""


def _names(text: str, name: str) -> bool:
    """Whether a message lists the expert: between quotes, commas or the like."""
    before = r"(?:['\":,=]|\b(?:experts|are|of|for|named?|no)) ?"
    return re.search(rf"{before}{re.escape(name)}(?=['\",;:.\n]|$)", text) is not None


def add_placing(parser: Any) -> None:
    """Declare how experts are put on a model that they do not quite fit."""
    add = parser.add_argument_group("where experts and model differ").add_argument
    add(
        "--missing",
        choices=("error", "drop"),
        default="error",
        help="modules that the model does not have are an error, or left out with a warning (default: %(default)s)",
    )
    add(
        "--absent",
        choices=("mask", "base"),
        default="mask",
        help="in a module that not every expert has only those that have it compete, or the others too, adding zero "
        "(default: %(default)s)",
    )


def placing_of(args: argparse.Namespace) -> dict[str, str]:
    """What `patch` takes of `add_placing`, where it is not its own default."""
    given = {"missing": args.missing, "absent": args.absent}
    return {name: value for name, value in given.items() if value not in ("error", "mask")}


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


def add_routers(parser: Any) -> None:
    """Declare --routers."""
    parser.add_argument(
        "--routers",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="what `train-routers` wrote (file or its folder), for the methods that it was trained for",
    )


def routers_of(args: argparse.Namespace) -> dict[str, Any]:
    """{method: its routers} of --routers; ValueError for files that are none, and for two of one method."""
    from ..experts.routers import read_routers

    found: dict[str, Any] = {}
    for path in args.routers:
        routers = read_routers(path)
        if routers.method in found:
            raise ValueError(f"--routers: two files are for method '{routers.method}'; evaluate them one after another")
        found[routers.method] = routers
    return found


def placed(runs: list[Run], args: argparse.Namespace) -> list[Run]:
    """The runs, on a model that the experts do not quite fit, as `add_placing` says."""
    return [run if run.method is None else replace(run, placing=placing_of(args)) for run in runs]


def with_routers(runs: list[Run], routers: dict[str, Any]) -> list[Run]:
    """The runs, those of trained methods with their routers. ValueError for a run without, and a file without a run."""
    from ..methods import get_method

    trained = {run.method for run in runs if run.method is not None and get_method(run.method).learned is not None}
    if lost := sorted(trained - routers.keys()):
        raise ValueError(f"{', '.join(lost)} needs --routers FILE, from `moerge train-routers --method {lost[0]}`")
    if unused := sorted(routers.keys() - trained):
        raise ValueError(f"--routers: a file is for method {', '.join(unused)}, which is not asked for")
    return [replace(r, options=r.options | {"routers": routers[r.method]}) if r.method in trained else r for r in runs]


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


def renames(texts: list[str]) -> dict[str, str]:
    """{old: new} of --rename; an empty OLD is the start of every path, an empty NEW leaves OLD out."""
    found: dict[str, str] = {}
    for text in texts:
        old, equals, new = text.partition("=")
        if not equals or not (old or new):
            raise ValueError(f"--rename takes OLD=NEW, got {text!r}")
        if old in found:
            raise ValueError(f"--rename {old}=... is given twice: {found[old]!r} and {new!r}")
        found[old] = new
    return found


def load_bank(args: argparse.Namespace) -> ExpertBank:
    """The experts of --experts with the gates of --gates, for --model; an empty bank where none may be given."""
    import torch

    from ..experts.bank import ExpertBank, load_experts

    if not args.experts:
        return ExpertBank((), {})
    dtype = args.expert_dtype and getattr(torch, args.expert_dtype)
    return load_experts(experts_of(args), dtype, base=args.model, gates=gates_of(args), **selection_of(args))
