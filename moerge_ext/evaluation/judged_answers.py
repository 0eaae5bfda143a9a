"""The answers that `moerge eval` stored, as what routers of texts are trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..methods.fixed import PREFIX
from ..queries.judged import Judged
from .runs import BASE
from .store import DAMAGED, file_stem, lines_of
from .tasks import Task


def judged_answers(folder: Path, tasks: Sequence[Task], names: Sequence[str], *, base: bool = False) -> Judged:
    """How right each expert was, 0 to 1, from `<folder>/answers/<task>/` of an evaluation of `expert:<name>` runs.

    tasks: those that were evaluated, with the same rows; base: the answers of the base as well. One ValueError for all
    that is missing: an expert without answers to a task, with answers to other rows or choices, or with answers of
    several models.
    """
    wanted = [(name, PREFIX + name) for name in names] + ([(BASE, BASE)] if base else [])
    problems, texts, rows, of = [], [], [], []
    for task in tasks:
        columns = []
        for name, label in wanted:
            try:
                columns.append(_column(Path(folder) / "answers" / task.name, task, label))
            except ValueError as error:
                problems.append(f"{name}, task {task.name}: {error}")
        texts += [row["input"] for row in task.rows]
        rows += zip(*columns, strict=True)
        of += [task.name] * len(task.rows)
    if problems:
        runs = ",".join(label for _, label in wanted)
        raise ValueError(
            "answers are missing:\n- " + "\n- ".join(problems) + f"\nmake them with `moerge eval --methods {runs} "
            f"--output {folder}` on these tasks"
        )
    return Judged(texts, torch.tensor(rows, device="cpu").float(), [name for name, _ in wanted], of)


def _column(folder: Path, task: Task, label: str) -> list[float]:
    """How right the answers of one run to one task are; ValueError says why there are none."""
    found = []
    for path in sorted(folder.glob(f"{file_stem(label)}.*.jsonl*")):
        try:
            lines = lines_of(path)
            settings = json.loads(lines[0])["settings"]
            right = [float(json.loads(line)["right"]) for line in lines[1:-1]]
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged ({error})") from error
        same = settings.get("run") == label and settings.get("rows") == task.digest
        ranked = settings.get("metric") == task.metric == "rank"
        if same and (not ranked or settings.get("choices") == task.closed):
            found.append((path, right))
    whole = [right for _, right in found if len(right) == len(task.rows)]
    if len(whole) > 1:
        files = ", ".join(path.name for path, _ in found)
        raise ValueError(f"answers of several models or settings ({files}): evaluate into a folder of its own")
    if not whole:
        part = f", only {len(found[0][1])} of them" if found else ""
        raise ValueError(f"no answers to its {len(task.rows)} rows in {folder}{part}")
    return whole[0]
