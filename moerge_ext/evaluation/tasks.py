"""Tasks on disk: a folder with JSON lines per split and a meta.json."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.listing import at_rows
from ..files.meta import META_FILE, read_instructed_rows, read_meta
from ..files.rows import read_rows
from .metrics import METRICS, check_metric

MAX_CHOICES = 32  # distinct training targets that still count as a closed set of answers


@dataclass(frozen=True)
class Task:
    """One evaluation set.

    rows: {"input", "target"} and perhaps "choices", with the task's "instruction" where they have none; metric: one of
    METRICS; choices: the closed set of answers, or None for open answers; part: "train" (its training data made an
    expert), "heldout", ...; digest: of the rows, of other rows with `digest_of`; split: their file.
    """

    name: str
    rows: tuple[dict, ...]
    metric: str
    choices: tuple[str, ...] | None
    part: str
    folder: Path
    digest: str
    split: str = "test"

    def choices_of(self, row: dict) -> tuple[str, ...]:
        """The answers that rank classification compares for one row, each once; none when they are no `closed_set`."""
        return closed_set(self.choices if row.get("choices") is None else row["choices"]) or ()

    @property
    def closed(self) -> str:
        """The digest of every row's choices."""
        return digest_of([self.choices_of(row) for row in self.rows])

    @property
    def chance(self) -> float | None:
        """Expected score of a uniform guess among the choices; None when a row's answer is open."""
        sizes = [len(self.choices_of(row)) for row in self.rows]
        return sum(1 / size for size in sizes) / len(sizes) if all(sizes) else None

    def examples(self, split: str = "train") -> list[dict]:
        """The rows of a split; ValueError when there is none."""
        return read_instructed_rows(self.folder / f"{split}.jsonl")

    def inputs(self) -> list[str]:
        """The inputs of the whole file that the rows were taken from."""
        return [row["input"] for row in self.examples(self.split)]


def closed_set(said: object) -> tuple[str, ...] | None:
    """The distinct texts of a list, or of ARC's {"text": [...], "label": [...]}; None unless they are at least two."""
    said = said.get("text") if isinstance(said, dict) else said
    if not isinstance(said, (list, tuple)) or not all(isinstance(choice, str) for choice in said):
        return None
    found = tuple(dict.fromkeys(said))
    return found if len(found) > 1 else None


def digest_of(rows: Sequence) -> str:
    """The digest of rows as they are in JSON."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def check_distinct(tasks: Sequence[Task]) -> None:
    """ValueError for two tasks of one name."""
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"tasks must have distinct names; several are called {', '.join(twice)}")


def load_task(
    folder: str | os.PathLike, *, split: str = "test", limit: int | None = None, metric: str | None = None
) -> Task:
    """Read `folder`/<split>.jsonl; metric and choices come from meta.json unless given.

    Choices: meta's "choices", else, for the metric "rank" alone, the distinct targets of train.jsonl when they are at
    most 32 and every row's target is one of them. ValueError lists what is wrong; ImportError for a metric whose
    package is not installed.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(
            f"a task is a folder that holds {split}.jsonl, got the file {folder}: "
            + (
                f"pass {folder.parent}"
                if folder.name == f"{split}.jsonl"
                else f"pass its folder, or move it to {folder.with_suffix('') / (split + '.jsonl')} and pass "
                f"{folder.with_suffix('')}"
            )
        )
    _check_one(folder, f"{split}.jsonl")
    rows = read_instructed_rows(folder / f"{split}.jsonl")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        rows = rows[:limit]
    meta = read_meta(folder / META_FILE)
    metric = metric or meta.get("metric", "exact_match")
    if metric not in METRICS:
        raise ValueError(
            f"task {folder.name}: metric must be one of {', '.join(METRICS)}, got {metric!r}; pass --metric"
        )
    try:
        check_metric(metric, [row["target"] for row in rows])
    except (ValueError, ImportError) as error:
        raise type(error)(f"task {folder.name}: {error}") from error
    task = Task(
        name=meta.get("task", folder.name),
        rows=tuple(rows),
        metric=metric,
        choices=_choices(meta, metric, folder, rows),
        part=meta.get("split", ""),
        folder=folder,
        split=split,
        digest=digest_of(rows),
    )
    if metric == "rank":
        _check_choices(task)
    return task


def _check_choices(task: Task) -> None:
    """ValueError for rows that rank classification cannot ask."""
    bad = [i for i, row in enumerate(task.rows) if row["target"] not in task.choices_of(row)]
    if bad:
        row = task.rows[bad[0]]
        said = json.dumps(row.get("choices") if row.get("choices") is not None else task.choices, ensure_ascii=False)
        raise ValueError(
            f"task {task.name}: rank classification needs the choices of every row, a list of at least two different "
            f"texts with the target among them; {at_rows(bad)} {'have' if len(bad) > 1 else 'has'} others, the first "
            f'has target {row["target"]!r:.60} and choices {said:.200}: give rows "choices", or meta.json a list '
            '"choices"'
        )


def _check_one(folder: Path, file: str) -> None:
    """ValueError for a folder of tasks, and for one without the file, with those that it has."""
    if not folder.is_dir() or (folder / file).is_file():
        return
    if inside := sorted(other.parent.name for other in folder.glob(f"*/{file}")):
        raise ValueError(
            f"{folder} is no task but holds {len(inside)} ({', '.join(inside[:3])}{', ...' if inside[3:] else ''}): "
            f"pass them, {folder}/*"
        )
    raise ValueError(
        f"{folder} holds no {file}: a task is a folder with that file; it has "
        f"{', '.join(sorted(other.name for other in folder.glob('*.jsonl'))) or 'no .jsonl at all'}"
    )


def _choices(meta: dict, metric: str, folder: Path, rows: Sequence[dict]) -> tuple[str, ...] | None:
    if "choices" in meta:
        return tuple(meta["choices"])
    train = folder / "train.jsonl"
    if metric != "rank" or not train.is_file() or not train.stat().st_size:
        return None
    found = sorted({row["target"] for row in read_rows(train)})
    closed = len(found) <= MAX_CHOICES and {row["target"] for row in rows} <= set(found)
    return tuple(found) if closed else None
