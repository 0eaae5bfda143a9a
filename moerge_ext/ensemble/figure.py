"""PELMo's Figure 5: how many experts to mix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation.evaluate import Score
from ..evaluation.report import mean
from ..files.atomic import write_figure
from .measure import MIXED, macro


def plot_top_k(scores: Sequence[Score], names: Sequence[str], path: Path) -> Path:
    """Write a PNG: the score against the number of experts mixed, 1, 2, ..., a line for every dataset.

    Of several datasets their macro-average too, thick; the best single expert by that mean is dashed. Whiskers are 95 %
    intervals. Errors: ImportError, with the install line, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "moerge_ext[plot]"') from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    datasets = list(dict.fromkeys(score.task for score in scores))
    mixed = sorted({score.method for score in scores if score.method.startswith(MIXED)}, key=_count)
    for part, line in _lines(datasets):
        values = [mean([s for s in scores if s.method == method and s.task in part]) for method in mixed]
        heights = [100 * value for value, _, _ in values]
        # not below 0 by rounding
        errors = [
            [max(0.0, 100 * (value - low)) for value, low, _ in values],
            [max(0.0, 100 * (high - value)) for value, _, high in values],
        ]
        axis.errorbar([_count(method) for method in mixed], heights, yerr=errors, marker="o", capsize=3, **line)
    best = max(names, key=lambda name: macro(scores, name))
    axis.axhline(100 * macro(scores, best), ls="--", color="gray", label=f"best expert: {best}")
    axis.set_xticks([_count(method) for method in mixed])
    axis.set_xlabel("experts mixed per question")
    axis.set_ylabel("% right")
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure)
    return path


def _count(method: str) -> int:
    return int(method.removeprefix(MIXED))


def _lines(datasets: Sequence[str]) -> list[tuple[list[str], dict]]:
    """(datasets, how their mean is drawn) of every line."""
    lines = [([name], {"label": name}) for name in datasets]
    if len(datasets) > 1:
        lines.append((list(datasets), {"label": "macro-average", "color": "black", "lw": 2.5}))
    return lines
