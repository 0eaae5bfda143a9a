"""`moerge convert`: an adapter of another format as a PEFT folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("source", help="MLX-LM folder, GGUF file of llama.cpp, PEFT folder in parts, or a hub id of one")
    add("output", type=Path, help="the PEFT folder to write: empty, or not there yet")
    add("--base", metavar="DIR", help="folder or hub id of the base model, whose config some GGUF files need")
    add(
        "--allow-pickle",
        action="store_true",
        help="read adapter_model.bin (torch.load, weights only): for files of people you trust",
    )


def run(args: argparse.Namespace) -> int:
    """Returns the exit status; ValueError for what the user can mend."""
    from ..experts.convert import convert_adapter

    print(convert_adapter(args.source, args.output, base=args.base, allow_pickle=args.allow_pickle))
    return 0
