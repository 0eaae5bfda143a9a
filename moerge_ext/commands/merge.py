"""`moerge merge`: several experts as one PEFT adapter, or as a full model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..files.counting import counted
from .expert_options import add_experts, add_selection, experts_of, pairs, selection_of
from .model_options import add_model
from .progress import add_progress

if TYPE_CHECKING:
    from ..exporting.merge import Merge


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    from ..exporting.products import METHODS

    add = parser.add_argument
    add_experts(parser)
    add("--output", required=True, type=Path, metavar="DIR", help="the folder to write: empty, or not there yet")
    add(
        "--method",
        choices=METHODS,
        default=METHODS[0],
        help="the mean of the experts' products B A, or of A and of B (default: %(default)s)",
    )
    add(
        "--weight",
        action="append",
        default=[],
        metavar="NAME=W",
        help="of one expert, as it is; one for each of them (default: 1 / number of experts)",
    )
    add("--rank", type=int, metavar="R", help="at most, by singular values, the error is said (default: exact)")
    add_model(parser, required=False, more=": to hold the experts against it")
    add("--full", action="store_true", help="write the base of --model with the merge in its weights")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the base model")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add_selection(parser, dtype=False)
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the folder and says what is in it; returns the exit status. ValueError for what the user can mend."""
    from ..experts.bank import load_experts
    from ..exporting.merge import check_arguments, merge_experts
    from ..files.atomic import check_new_folder
    from ..models.pretrained import load_model, load_tokenizer, usable_device

    weights = {name: _number(text) for name, text in pairs(args.weight, "--weight", "W").items()} or None
    check_new_folder(args.output)
    device = usable_device(args.device)
    experts = load_experts(experts_of(args), base=args.model, **selection_of(args))
    check_arguments(experts, args.method, weights, args.rank, args.model is not None, args.full)
    tokenizer = load_tokenizer(args.model) if args.full else None
    model = None if args.model is None else load_model(args.model, dtype=args.dtype, device=device)
    merge = merge_experts(
        experts,
        args.output,
        method=args.method,
        weights=weights,
        rank=args.rank,
        model=model,
        full=args.full,
        tokenizer=tokenizer,
        progress=not args.no_progress,
    )
    print(told(merge))
    return 0


def told(merge: Merge) -> str:
    """What was written, and how far it is from the exact merge."""
    ranks = sorted(set(merge.ranks.values()))
    span = "-".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1])))
    how = "exact" if merge.worst is None else f"{merge.error:.2%} off in all, {merge.worst[1]:.2%} in {merge.worst[0]}"
    return f"wrote {merge.path}: {counted(len(merge.ranks), 'module')}, rank {span} ({how})"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--weight takes NAME=W, a number, got {text!r}") from None
