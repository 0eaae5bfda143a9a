"""GLIDER's ablations, its Tables 2 and 3: a constant alpha, how many experts, a nucleus in place of a number."""

from __future__ import annotations

from bench.quality.real_rows import TOLD
from bench.quality.real_scores import Scores
from moerge_ext.evaluation.runs import ALPHAS, TOP_KS, TOP_PS

AGAINST = f"glider{TOLD}"  # alpha by the threshold, k = 2
PARTS = {"train": "held in", "heldout": "held out"}
SHOWN = {
    **{f"glider/gamma=0/beta={alpha}{TOLD}": f"alpha = {alpha:,}" for alpha in ALPHAS},
    **{(AGAINST if k == 2 else f"glider/top_k={k}{TOLD}"): f"k = {k}" for k in TOP_KS},
    **{f"glider/top_k=none/top_p={p}{TOLD}": f"top-p = {p:.0%}" for p in TOP_PS},
}


def table(scores: Scores) -> str:
    """Every row of both, and its paired difference to the method as it is; nothing where none was asked."""
    if not any(row in scores.known for row in SHOWN if row != AGAINST):
        return ""
    parts = {part: scores.results.part(part) for part in PARTS}
    head = " | ".join(f"{PARTS[part]} | minus k = 2" for part in parts)
    lines = [f"| glider, zero-shot (the tasks' own instructions) | {head} |", "| --- |" + " ---: |" * 2 * len(parts)]
    for row, name in SHOWN.items():
        if row in scores.known:
            cells = []
            for names in parts.values():
                cells.append("{:.1f} ({:.0f}-{:.0f})".format(*scores.mean(row, names)))
                difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*scores.difference(row, AGAINST, names))
                cells.append("" if row == AGAINST else difference)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nWith k = 2 and alpha 103 above the threshold, 3 below it, as everywhere else here."
