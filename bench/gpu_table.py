"""The last thing gpu_check.sh prints: a line for every measured linear cell.

Wall time of plain, ours / plain, ours / floor, what the kernels of plain and ours take by themselves, the best peer.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

from bench.results import FOLDER, Row, latest, read_all

CELL = ("dtype", "D", "O", "E", "K", "R", "T", "popularity", "mode", "cache")


def how(row: Row) -> str:
    return "graphs" if "graphs" in row["settings"] else "eager"


def lines(rows: list[Row], kernels: list[Row]) -> list[str]:
    """One line per cell, and how it was run; `kernels`: the rows of that suite."""
    cells: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.get("status") == "ok":
            cells[(*(row[name] for name in CELL), how(row))][row["candidate"]] = row
    alone = {(*(row[name] for name in CELL), row["candidate"]): row.get("kernel_us") for row in kernels}
    head = f"{'cell':<64} {'plain us':>9} {'ours/plain':>10} {'ours/floor':>10} {'kernels: plain':>14} {'ours':>8}"
    out = [f"{head}  best peer"]
    for key, found in sorted(cells.items(), key=lambda item: str(item[0])):
        ours = found.get("ours")
        if ours is None or "plain" not in found:
            continue
        no_rivals = ("plain", "plain_again", "peft_one")
        peers = {name: row for name, row in found.items() if name not in no_rivals and not name.startswith("ours")}
        best = min(peers, key=lambda name: peers[name]["ratio"], default=None)
        dtype, D, O, E, K, R, T, popularity, mode, cache, run = key
        name = f"{dtype} {D}x{O} E={E} K={K} R={R} T={T} {popularity} {mode} {cache} {run}"
        peer = f"{best} {peers[best]['ratio']:.2f}" if best else "none"
        wall = f"{found['plain']['us']:>9.1f} {ours['ratio']:>10.2f} {ours['over_floor']:>10.1f}"
        plain_us, ours_us = (_number(alone.get((*key[:-1], label))) for label in ("plain", "ours"))
        out.append(f"{name:<64} {wall} {plain_us:>14} {ours_us:>8}  {peer}")
    return out


def _number(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu_table.py", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=FOLDER)
    args = parser.parse_args()
    here = [row for row in read_all(args.results) if row.get("device") == args.device]
    rows = [row for row in here if row.get("suite") == "linear"]
    eager = [row for row in rows if how(row) == "eager"]
    graphs = [row for row in rows if how(row) == "graphs"]
    kernels = latest(row for row in here if row.get("suite") == "kernels")
    print("\n".join(lines(latest(eager) + latest(graphs), kernels)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
