"""Ours / plain under other values of csrc/cuda/crossovers.h, on a GPU: which constant costs what, in one process.

Needs a build in which they are variables (`cmake -DMOERGE_TUNE=ON`, or `bench/gpu_check.sh --part sweep`). Every cell
is checked against the reference and timed as in the suite linear, by replay of captured graphs, once as built and once
per variant that applies to its T. Rows go to <results>/<machine>_sweep.json.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

import torch

from bench import linear, machine
from bench.cells import Cell
from bench.data import Weights
from bench.results import FOLDER
from bench.timing import Clock, Settings
from moerge_ext.native import loading

NEVER = 10**9
# (name, value) of what is changed, and for which T it says something
VARIANTS = (
    ({"kDecodeLinearTokens": 0}, range(1, 2)),
    ({"kDecodeLinearTokens": 16}, range(2, 17)),
    ({"kBranchFirstTokens": 1}, range(2, 512)),
    ({"kBranchFirstTokens": NEVER}, range(512, NEVER)),
    ({"kExpandBlocks": 128}, range(2, NEVER)),
    ({"kExpandBlocks": 512}, range(2, NEVER)),
    ({"kShrinkBlocks": 1024}, range(2, NEVER)),
    ({"kShrinkParts": 8}, range(2, NEVER)),
    ({"kScoresStart": 6}, range(2, NEVER)),
)
WHAT = (
    "ours / plain of routed_linear, bfloat16, 4096 -> 4096, K = 2, R = 16, uniform popularity, cold, replay of "
    "captured graphs; `variant`: what was changed of csrc/cuda/crossovers.h, `as is`: nothing. Every cell agreed with "
    "the reference before it was timed."
)


class Constants:
    """The variables of crossovers.h in a build that has them."""

    def __init__(self) -> None:
        library = ctypes.CDLL(str(loading.kernels_path()))
        try:
            self._find = library.moerge_crossover
        except AttributeError:
            raise SystemExit("gpu_sweep: the constants of this build are fixed; build with -DMOERGE_TUNE=ON") from None
        self._find.restype = ctypes.POINTER(ctypes.c_int64)
        self._find.argtypes = [ctypes.c_char_p]

    def change(self, values: dict[str, int]) -> dict[str, int]:
        """Sets them; returns what they were. KeyError for a name that there is not."""
        before = {}
        for name, value in values.items():
            if not (place := self._find(name.encode())):
                raise KeyError(name)
            before[name], place[0] = place[0], value
        return before


def variants(T: int) -> Iterator[tuple[str, dict[str, int]]]:
    """(label, changes), as built first."""
    yield "as is", {}
    for changes, tokens in VARIANTS:
        if T in tokens:
            yield ", ".join(f"{name} = {value}" for name, value in changes.items()), changes


def rows_of(cell: Cell, weights: Weights, constants: Constants, ability: dict[str, float]) -> list[dict[str, Any]]:
    settings, device = Settings(graphs=True, rounds=7, min_sample=0.002, memory_gib=60), weights.device
    out = []
    for label, changes in variants(cell.T):
        before = constants.change(changes)
        try:
            with torch.no_grad():
                found = linear.measure_cell("linear", cell, weights, ability, Clock(device, True), settings)
        finally:
            constants.change(before)
        by = {row["candidate"]: row for row in found}
        ours, row = by["ours"], {"E": cell.E, "T": cell.T, "variant": label}
        if ours["status"] != "ok":
            out.append(row | {"status": ours["status"], "note": ours["note"]})
            continue
        kept = {"ours_us": ours["us"], "ratio": ours["ratio"], "noise": ours["noise"], "floor_us": ours["floor_us"]}
        out.append(row | {"plain_us": by["plain"]["us"]} | kept)
    return out


def main() -> int:
    """0, or 1 when an answer of ours was wrong."""
    parser = argparse.ArgumentParser(prog="bench/gpu_sweep.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 36, 166])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 128, 512, 4096])
    parser.add_argument("--seconds", type=float, default=150, help="no cell is started after this")
    args = parser.parse_args()
    constants, device, begin = Constants(), torch.device("cuda"), time.perf_counter()
    environment, ability = machine.environment(device), machine.measure(device)
    environment["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    rows: list[dict[str, Any]] = []
    file = args.results / f"{environment['machine']}_sweep.json"
    for E in args.experts:
        cell = Cell(4096, 4096, E, 2, 16, 1, "bfloat16", only=())
        weights = Weights(cell, device, Settings(memory_gib=60))
        for T in args.tokens:
            if time.perf_counter() - begin > args.seconds:
                break
            rows += (found := rows_of(replace(cell, T=T), weights, constants, ability))
            said = [f"{row['variant']} {row['ratio']:.3f}" if "ratio" in row else str(row) for row in found]
            print(f"E={E} T={T}: {'; '.join(said)}", flush=True)
            about = {"what": WHAT, "environment": environment, "ability": ability, "rows": rows}
            file.write_text(json.dumps(about, indent=1) + "\n")
    return int(any("ratio" not in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
