"""Scores as markdown, CSV, JSON, a table on the terminal, and a bar chart."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..files.atomic import write_atomically, write_figure
from .cost import Cost
from .metrics import GRADED
from .scores import Score

CHANCE = "chance"
COLUMNS = 6  # that fit on a terminal
EACH = ("tokens_per_second", "seconds", "passes", "embedded", "written")  # of `Cost.each`


def grid(scores: Sequence[Score]) -> tuple[list[str], list[str], dict[tuple[str, str], Score]]:
    """(methods, tasks, {(method, task): score}), both in the order of the scores."""
    methods = list(dict.fromkeys(score.method for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    return methods, tasks, {(score.method, score.task): score for score in scores}


def mean(scores: Sequence[Score]) -> tuple[float, float, float]:
    """(mean of the tasks' scores, low and high of its 95 % interval): the tasks are fixed and their items a sample.

    From the limits l, u of every task's Wilson interval (Zou & Donner 2008, Statistics in Medicine 27, for sums of
    proportions): value - sqrt(sum (p - l)^2) / n and value + sqrt(sum (u - p)^2) / n, which lie in [0, 1].
    """
    value = sum(s.value for s in scores) / len(scores)
    below, above = (math.hypot(*(s.value - s.interval[side] for s in scores)) / len(scores) for side in (0, 1))
    return value, max(0.0, value - below), min(1.0, value + above)


def mean_chance(chances: Sequence[float | None]) -> float | None:
    """Their mean; None when one of them is not known."""
    return None if None in chances else sum(chances) / len(chances)


def cells(scores: Sequence[Score]) -> list[list[str]]:
    """The table as text: a header, the chance row, one row per method; means over the tasks of every part first.

    "-" is the chance of open answers; where all are, there is no such row.
    """
    methods, tasks, at = grid(scores)
    first = {task: at[methods[0], task] for task in tasks}
    parts: dict[str, list[str]] = {}
    for task in tasks:
        parts.setdefault(first[task].part, []).append(task)
    names = {"train": "held-in", "heldout": "held-out"}
    sizes = [sum(first[task].n for task in group) for group in parts.values()]
    header = [
        "",
        *(f"mean {names.get(part, part)}".strip() + f" (n={n})" for part, n in zip(parts, sizes, strict=True)),
    ]
    header += [f"{task} ({_what(first[task])}n={first[task].n})" for task in tasks]
    rows = [header]
    chances = [mean_chance([first[t].chance for t in group]) for group in (*parts.values(), *([t] for t in tasks))]
    if any(chance is not None for chance in chances):
        rows.append([CHANCE, *("-" if chance is None else f"{100 * chance:.1f}" for chance in chances)])
    for method in methods:
        row = [method]
        for group in parts.values():
            row.append(share(*mean([at[method, task] for task in group])))
        row += [share(at[method, task].value, *at[method, task].interval) for task in tasks]
        rows.append(row)
    return rows


def _what(score: Score) -> str:
    """The metric of a task whose score is no share of right answers."""
    return f"{score.metric}, " if score.metric in GRADED else ""


def unit(scores: Sequence[Score]) -> str:
    """What the numbers are."""
    return "score in %" if any(score.metric in GRADED for score in scores) else "% right"


COST = ("tokens/s", "s per answer", "passes", "embedded", "written")


def costs(scores: Sequence[Score]) -> list[list[str]]:
    """The costs as text: a header, one row per method over all tasks; no row for a method whose cost is not known."""
    rows = [["cost per answer", *COST]]
    for method in grid(scores)[0]:
        mine = [score.cost for score in scores if score.method == method]
        if None not in mine:
            each = _total(mine).each()
            counts = (f"{each[name]:.4g}" for name in ("passes", "embedded", "written"))
            rows.append([method, f"{each['tokens_per_second']:.0f}", f"{each['seconds']:.3g}", *counts])
    return rows


def _total(parts: Sequence[Cost]) -> Cost:
    return Cost(*(sum(values) for values in zip(*(vars(cost).values() for cost in parts), strict=True)))


def share(value: float, low: float, high: float) -> str:
    """In percent: "50.0 (38-62)"."""
    return f"{100 * value:.1f} ({100 * low:.0f}-{100 * high:.0f})"


def markdown(scores: Sequence[Score]) -> str:
    """A markdown table, in percent: score and 95 % interval of every task, mean and its interval of every part.

    Below it the one of the costs, where they are known.
    """
    tables = [cells(scores), *([costs(scores)] if len(costs(scores)) > 1 else [])]
    texts = []
    for header, *rows in tables:
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
        texts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(texts)


def terminal_costs(scores: Sequence[Score]) -> Table:
    """The table of the costs for rich."""
    header, *rows = costs(scores)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    return table


def terminal(scores: Sequence[Score]) -> Table:
    """The same table for rich: tasks as rows when there are many; of many tasks and methods only the means."""
    rows, title = cells(scores), f"{unit(scores)}, with 95 % intervals"
    if len(rows[0]) > COLUMNS and len(rows) - 1 > COLUMNS:
        parts = len({score.part for score in scores})
        rows, title = [row[: 1 + parts] for row in rows], title + " (every task: results.md)"
    elif len(rows[0]) > COLUMNS:
        rows = [list(column) for column in zip(*rows, strict=True)]
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def records(scores: Sequence[Score]) -> list[dict]:
    """One plain dict per method and task; seconds, passes, embedded and written are per answer."""
    return [
        {
            "method": s.method,
            "task": s.task,
            "part": s.part,
            "metric": s.metric,
            "n": s.n,
            "score": s.value,
            "low": s.interval[0],
            "high": s.interval[1],
            "chance": s.chance,
            **(dict.fromkeys(EACH) if s.cost is None else {name: round(v, 6) for name, v in s.cost.each().items()}),
        }
        for s in scores
    ]


def write(scores: Sequence[Score], folder: Path) -> list[Path]:
    """Write results.md, results.csv, results.json and, with matplotlib, results.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = records(scores)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    contents = {
        "results.md": markdown(scores),
        "results.csv": text.getvalue(),
        "results.json": json.dumps(rows, indent=1) + "\n",
    }
    paths = []
    for name, content in contents.items():
        paths.append(folder / name)
        write_atomically(paths[-1], lambda file, content=content: file.write_text(content, encoding="utf-8"))
    try:
        paths.append(bars(scores, folder / "results.png"))
    except ImportError as error:
        Console(stderr=True).print(f"no bar chart: {error}", highlight=False)
    return paths


def bars(scores: Sequence[Score], path: Path) -> Path:
    """Write a PNG: the mean score of every method over the tasks of every part, with 95 % intervals, chance dotted.

    Errors: ImportError, with the install line, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the chart needs matplotlib: pip install "moerge_ext[plot]"') from error
    methods, _, _ = grid(scores)
    parts = list(dict.fromkeys(score.part for score in scores))
    figure = Figure(figsize=(5 * len(parts), 1 + 0.34 * len(methods)), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, part in zip(axes, parts, strict=True):
        values = [mean([s for s in scores if s.part == part and s.method == method]) for method in methods]
        errors = [[100 * (v - low) for v, low, _ in values], [100 * (high - v) for v, _, high in values]]
        axis.barh(methods, [100 * v for v, _, _ in values], xerr=errors, color="tab:blue")
        mine = {s.task: s.chance for s in scores if s.part == part}
        if (chance := mean_chance(list(mine.values()))) is not None:
            axis.axvline(100 * chance, ls=":", color="black", label=CHANCE)
            axis.legend(fontsize=8)
        title = {"train": "held-in tasks", "heldout": "held-out tasks"}.get(part, part or "tasks")
        items = sum({s.task: s.n for s in scores if s.part == part}.values())
        axis.set_title(f"{title}: mean of {len(mine)}, n={items}", fontsize=10)
        axis.set_xlabel(unit(scores))
        axis.set_xlim(0, 100)
    axes[0].invert_yaxis()
    write_figure(path, figure)
    return path
