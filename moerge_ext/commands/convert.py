"""`moerge convert`: an adapter of another format as a PEFT folder, of another kind as a LoRA."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..files.counting import counted
from .model_options import a_place
from .progress import add_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("source", help="MLX-LM folder, GGUF file of llama.cpp, PEFT folder in parts, or a hub id of one")
    add("output", type=Path, help="the PEFT folder to write: empty, or not there yet")
    add(
        "--model",
        "--base",
        dest="base",
        type=a_place,
        metavar="DIR",
        help="folder or hub id of the base model: for GGUF files that need it and --to-lora",
    )
    add(
        "--allow-pickle",
        action="store_true",
        help="read adapter_model.bin (torch.load, weights only): for files of people you trust",
    )
    add(
        "--to-lora",
        action="store_true",
        help="of another kind that merges into a weight (DoRA, LoHa, OFT, ...); exact unless a loss is allowed",
    )
    add(
        "--rank",
        type=int,
        metavar="R",
        help="with --to-lora: at most this rank, the best there is in the Frobenius norm",
    )
    add(
        "--max-error",
        type=float,
        metavar="E",
        help="with --to-lora: the smallest ranks that lose at most this part of each module's change",
    )
    add_progress(parser)


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError for what the user can mend."""
    from ..experts.convert import convert_adapter

    if args.to_lora:
        return _to_lora(args)
    if args.rank is not None or args.max_error is not None:
        raise ValueError("--rank and --max-error go with --to-lora")
    path = convert_adapter(args.source, args.output, base=args.base, allow_pickle=args.allow_pickle)
    print(path)
    if note := _as_it_was(args.source, path):
        print(note)
    return 0


def _as_it_was(source: str, written: Path) -> str | None:
    """What was copied where one might expect that it was converted."""
    from ..experts.formats import format_of
    from ..experts.formats.peft import CONFIG_FILE
    from ..experts.formats.peft_config import read_config
    from ..experts.hub import find_adapter

    init = read_config(written / CONFIG_FILE).get("init_lora_weights")
    if init in ("pissa", "olora"):
        return (
            f"copied as it was: it still needs the base that its {init} start was taken from; PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) makes a LoRA of it that does not"
        )
    return "copied as it was: a PEFT folder already" if format_of(find_adapter(source)[1]) == "PEFT" else None


def _to_lora(args: argparse.Namespace) -> int:
    from ..experts.to_lora import convert_to_lora

    if args.allow_pickle:
        raise ValueError("--to-lora opens no pickle: save the adapter as safetensors first")
    bounds = {"rank": args.rank, "max_error": args.max_error}
    made = convert_to_lora(args.source, args.output, args.base, **bounds, progress=not args.no_progress)
    module, error = made.worst
    ranks = "-".join(str(rank) for rank in sorted({min(made.ranks.values()), max(made.ranks.values())}))
    print(made.path)
    print(
        f"{made.kind} of {counted(len(made.ranks), 'module')} as LoRA of rank {ranks}; "
        f"largest relative error {error:.2g} ({module})"
    )
    return 0
