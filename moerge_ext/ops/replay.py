"""`python -m moerge_ext.ops.replay FILE`: makes the call again whose arguments MOERGE_LOG_CALLS=FILE has kept.

The file is read without running anything that is in it (torch.load with weights_only=True).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from .calls import FORMAT, VARIABLE, described


def read(path: Path) -> dict[str, Any]:
    """The kept call; ValueError for a file that is none."""
    try:
        kept = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise ValueError(
            f"{path} cannot be read as a kept call ({type(error).__name__}): write one with {VARIABLE}=FILE"
        ) from error
    if not isinstance(kept, dict) or kept.get("format") != FORMAT or not hasattr(torch.ops.moerge, str(kept.get("op"))):
        raise ValueError(f"{path} is no kept call of an op of moerge_ext: write one with {VARIABLE}=FILE")
    return kept


def replay(path: Path, *, device: str | None = None) -> tuple[str, Any]:
    """(the call as text, what it returns); raises what the op raises. device: default the one it was made on."""
    kept = read(path)
    op = getattr(torch.ops.moerge, kept["op"]).default
    args = [
        arg if where is None else arg.to(device or where)
        for arg, where in zip(kept["args"], kept["devices"], strict=True)
    ]
    return described(op, args), op(*args)


def main(argv: list[str] | None = None) -> int:
    """0 when the call succeeds here, 1 when it fails again, 2 for a file that is no kept call."""
    parser = argparse.ArgumentParser(prog="python -m moerge_ext.ops.replay", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--device", help="where to run it (default: where it failed)")
    args = parser.parse_args(argv)
    try:
        kept = read(args.file)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"kept with torch {kept['torch']}; it failed with: {kept['error']}")
    try:
        text, result = replay(args.file, device=args.device)
    except (RuntimeError, ValueError) as error:
        print(f"it fails again: {str(error).partition(chr(10))[0]}")
        return 1
    print(f"{text}\nsucceeds here: {type(result).__name__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
