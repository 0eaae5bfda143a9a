"""What a GPU has measured: wall time beside the plain layer, single kernels, and what other constants give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .results import Row

SWEEP, FIRST = "h200_sweep.json", "h200_sweep_first.json"  # of today's kernels, and of those before them
PEERS = ("dense", "sort_loop", "grouped_mm", "gather_bmm", "torch_reference", "peft_arrow", "peft_one")
CHANGED = 0.05  # what a constant must change of a cell to be named


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def gpu(rows: list[Row], folder: Path) -> str:
    """Empty of measurements: a line that says so."""
    file = folder / SWEEP
    if not file.exists():
        return "*Nothing recorded yet.*"
    found = json.loads(file.read_text())
    kernels = [row for row in rows if row.get("suite") == "kernels" and row.get("device") == "cuda"]
    about, ability = found["environment"], found["ability"]
    facts = f"**{about['machine']}**, {about['isa']}; torch {about['torch']}; "
    facts += f"commit {about['commit']}; {about['time'][:10]}. {ability['bandwidth'] / 1e3:.1f} TB/s, "
    facts += f"{ability['bfloat16'] / 1e3:.0f} TFLOP/s bfloat16 as measured beside it."
    first = folder / FIRST
    before = json.loads(first.read_text())["rows"] if first.exists() else []
    parts = [facts, _ratios(found["rows"], before), _kernels(kernels), _constants(found)]
    return "\n\n".join(part for part in parts if part)


def _as_is(rows: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["T"], row["E"]): row for row in rows if row["variant"] == "as is"}


def _ratios(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> str:
    cells, first = _as_is(rows), _as_is(before)
    experts = sorted({e for _, e in cells})
    lines = []
    for t in sorted({t for t, _ in cells}):
        mine = [cells[t, e] for e in experts]
        noise = max(row["noise"] for row in mine)
        was = [f", first {first[t, e]['ratio']:.2f}" if (t, e) in first else "" for e in experts]
        ratios = [f"{row['ratio']:.2f} ({row['ours_us']:.0f} µs{old})" for row, old in zip(mine, was, strict=True)]
        lines.append([str(t), f"{min(row['plain_us'] for row in mine):.1f}", *ratios, f"±{noise * 100:.1f} %"])
    return table(["T", "plain µs", *(f"ours / plain, E = {e}" for e in experts), "A/A noise"], lines)


def _kernels(rows: list[Row]) -> str:
    """What kernels take by themselves: each of plain and of ours, and those of every peer together."""
    lines = []
    for t in sorted({row["T"] for row in rows}):
        mine = {row["candidate"]: row for row in rows if row["T"] == t and row["status"] == "ok"}
        for label in ("plain", "ours"):
            named = [f"{short(name)} {us:.1f}" for name, us in mine[label]["kernels"].items()]
            lines.append([str(t), label, f"{mine[label]['kernel_us']:.1f}", ", ".join(named)])
        peers = sorted((row["kernel_us"], label) for label, row in mine.items() if label in PEERS)
        lines.append([str(t), "peers", "", ", ".join(f"{label} {us:.1f}" for us, label in peers)])
    return table(["T", "E = 36", "µs of kernels", "each"], lines) if lines else ""


def short(name: str) -> str:
    """What a kernel is called here: ours by its struct, a GEMM of the library as that, another by its function."""
    ours = re.match(r"void moerge::cuda::run<moerge::cuda::(?:\(anonymous namespace\)::|\w+::)*(\w+)", name)
    if ours or name.startswith("nvjet"):
        return ours[1] if ours else "GEMM"
    return name.removeprefix("void ").partition("<")[0].partition(" ")[0].rpartition("::")[2]


def _constants(found: dict[str, Any]) -> str:
    """By how much every other value of the constants changed our time, where it changed it."""
    base = {(row["T"], row["E"]): row["ours_us"] for row in found["rows"] if row["variant"] == "as is"}
    experts = sorted({e for _, e in base})
    labels = found.get("variants", {})  # what a variant changes, where its name does not say so
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in found["rows"]):
        mine = [row for row in found["rows"] if row["variant"] == variant]
        cells = {(row["T"], row["E"]): row["ours_us"] / base[row["T"], row["E"]] for row in mine}
        told = []
        for t in sorted({t for t, _ in cells}):
            changes = [cells[t, e] for e in experts if (t, e) in cells]
            if any(abs(change - 1) > CHANGED for change in changes):
                told.append(f"T = {t}: " + " / ".join(f"{change:.2f}" for change in changes))
        if variant != "as is":
            lines.append([labels.get(variant, variant), "; ".join(told) or "none"])
    head = f"our time / as is, E = {' / '.join(map(str, experts))}, where one differs by over {CHANGED:.0%}"
    return table(["instead of the constants as they were", head], lines)
