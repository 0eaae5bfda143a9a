"""The pool made or used in another way, one change at a time: whether that is why a claim fails here.

The change stands behind a row's name, as in "phatgoose/norm=0.5".
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.quality import real
from bench.quality.real_differences import LEGEND, cell
from bench.quality.real_scores import Scores
from bench.quality.real_verdicts import verdict
from moerge_ext import load_experts
from moerge_ext.experts.bank import ExpertBank

if TYPE_CHECKING:
    from bench.quality.real_routers import Deciders

NONE = ""
CHANGES = {  # behind a row's name: how the table calls it
    NONE: "as everywhere else here",
    "/gates=30": "gates of 30 steps of 4 rows",
    "/gates=100": "gates of 100 steps of 4 rows",
    "/norm=0.5": "every LoRA at half its size",
    "/layers=10": "no expert in the first 10 of 30 layers",
    "/lr=0.001": "experts of alpha = rank, trained at 0.001",
    "/gates=12x16": "gates of 12 steps of 16 rows",
}
ROWS = ("phatgoose", "retrieval", "merged", "average_activation")
GATED = ROWS[:1]  # all that gates can change
CLAIMED = ROWS[1:]  # what PHATGOOSE is claimed to surpass on held-out tasks
RUNS = tuple(row + change for change in CHANGES for row in (GATED if "gates" in change else ROWS))


def split(run: str) -> tuple[str, str]:
    """(the row, its change) of a name."""
    found = re.search(r"/(gates|norm|layers|lr)=[0-9.x]+$", run)
    return (run, NONE) if found is None else (run[: found.start()], found[0])


def pool_of(change: str, deciders: Deciders) -> tuple[ExpertBank, dict[str, Any]]:
    """(the pool with a change, the routers of its rows)."""
    kind, _, value = change.removeprefix("/").partition("=")
    places = deciders.places
    if kind == "gates":
        return deciders.with_gates(value), {}
    if kind == "lr":
        other = deciders.of(replace(places, experts=real.OTHER_RATE.format(value)))
        return other.pool, other.known()
    folders = [places.expert(name) for name in deciders.names]
    kept = None if kind == "norm" else rf"\.layers\.(?!({'|'.join(str(n) for n in range(int(value)))})\.)"
    pool = load_experts(folders, modules=kept)
    if kind == "norm":
        for module in pool.modules.values():
            module.lora_B.mul_(float(value))
    return pool, deciders.known(pool)


def table(scores: Scores | None) -> str:
    """Every row under every change, PHATGOOSE minus the others, and what the change makes of each row."""
    if scores is None:
        return ""
    names = scores.results.part("heldout")
    head = [f"minus {row}" for row in CLAIMED]
    lines = [f"| change | {' | '.join(ROWS)} | {' | '.join(head)} |"]
    lines.append("| --- |" + " ---: |" * (len(ROWS) + len(head)))
    for change, said in CHANGES.items():
        ours = GATED[0] + change
        others = [row + (NONE if "gates" in change else change) for row in CLAIMED]
        if not {ours, *others} <= scores.known:
            continue
        cells = ["{:.1f} ({:.0f}-{:.0f})".format(*scores.mean(ours, names))]
        cells += ["" if "gates" in change else f"{scores.mean(row, names)[0]:.1f}" for row in others]
        cells += [cell(verdict(scores.differences(ours, row, names))) for row in others]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    lines += ["", f"| with minus without the change | {' | '.join(ROWS)} |", "| --- |" + " ---: |" * len(ROWS)]
    for change, said in CHANGES.items():
        runs = {row: row + change for row in ROWS if change and row + change in scores.known}
        cells = [cell(verdict(scores.differences(runs[row], row, names))) if row in runs else "" for row in ROWS]
        lines += [f"| {said} | {' | '.join(cells)} |"] if runs else []
    counts = ", ".join(f"{name} {len(scores.results.tasks[name]['targets'])}" for name in names)
    return "\n".join(lines) + f"\n\nItems: {counts}. {LEGEND}"
