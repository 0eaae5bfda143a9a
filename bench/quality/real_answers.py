"""Item-level answers in one compressed file, from which every figure is computed, and can be scored again.

Lines of JSON: {"facts"}, then {"task", ...} with a digest of every item's target (the data are not ours to copy), then
{"run", "task", "answers", "right"}, of tasks whose answers can be partly right with "scores" for "right": these are
scored again by who has the data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge_ext.evaluation.metrics import GRADED

FOLDER = Path(__file__).resolve().parents[1] / "results"
FILES = "quality_real_*.jsonl.gz"  # one for every size of the pool
HELD_OUT_FILES = "quality_heldout_*.jsonl.gz"  # of fewer rows on more held-out items
OTHER_FILES = "quality_others_*.jsonl.gz"  # of these rows on the held-out tasks that are not in the others
VARIED_FILES = "quality_varied_*.jsonl.gz"  # of pools made in other ways, on held-out tasks
DIGITS = 12  # of a target's digest
SCORE_DIGITS = 4  # behind the point


@dataclass(frozen=True)
class Answered:
    """What one run answered to the items of one task; `right` as it was scored, between 0 and 1 by a GRADED metric."""

    run: str
    task: str
    answers: tuple[str, ...]
    right: tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """facts: recipe, experts and what they took; tasks: {name: its line}; answered: {(run, task): answers}."""

    facts: dict[str, Any]
    tasks: dict[str, dict]
    answered: dict[tuple[str, str], Answered]

    @property
    def runs(self) -> list[str]:
        return list(dict.fromkeys(run for run, _ in self.answered))

    def part(self, part: str) -> list[str]:
        """The tasks of "train" (held-in) or "heldout"."""
        return [name for name, task in self.tasks.items() if task["part"] == part]


def items(results: Results, names: Sequence[str] | None = None) -> str:
    """How many of every task, or of these: 24, or 100 to 192."""
    counts = sorted({len(results.tasks[name]["targets"]) for name in names or results.tasks})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def plain(text: str, metric: str) -> str:
    """What two answers must have in common to count as the same."""
    text = text.strip()
    return text.removesuffix(".").strip().casefold() if metric == "accuracy" else text


def digest(text: str, metric: str) -> str:
    return hashlib.sha256(plain(text, metric).encode()).hexdigest()[:DIGITS]


def scored_again(results: Results, answered: Answered) -> tuple[bool, ...]:
    """Which answers are right by the digests of their targets; ValueError for a metric that must read the targets."""
    task = results.tasks[answered.task]
    if task["metric"] in GRADED:
        raise ValueError(f"{task['task']}: {task['metric']} cannot be made of digests, expected right or wrong")
    pairs = zip(answered.answers, task["targets"], strict=True)
    return tuple(digest(answer, task["metric"]) == target for answer, target in pairs)


@dataclass(frozen=True)
class Asked:
    """What `evaluate` left in `folder`: which of its runs belong to the table, and what their names get behind them."""

    folder: Path
    tasks: Sequence[Any]
    scores: Sequence[Any]
    suffix: str = ""


def pack(chunks: Sequence[Sequence[Asked]], facts: dict, file: Path) -> None:
    """Write `file`; every chunk has other items of the same tasks, and the parts of a chunk have other runs."""
    write(collected(chunks, facts), file)


def collected(chunks: Sequence[Sequence[Asked]], facts: dict) -> Results:
    """What `pack` writes."""
    tasks: dict[str, dict] = {}
    answers: dict[tuple[str, str], list[dict]] = {}
    for parts in chunks:
        for task in parts[0].tasks:
            line = {"task": task.name, "part": task.part, "metric": task.metric, "chance": task.chance, "targets": []}
            known = tasks.setdefault(task.name, line)
            known["targets"] += [digest(row["target"], task.metric) for row in task.rows]
        for asked in parts:
            found = _stored(asked.folder)
            for score in asked.scores:
                items = found[score.method, score.task]
                answers.setdefault((score.method + asked.suffix, score.task), []).extend(items)
    answered = {
        key: Answered(*key, tuple(item["answer"] for item in items), _right(items, tasks[key[1]]["metric"]))
        for key, items in answers.items()
    }
    return Results(facts, tasks, answered)


def _right(items: Sequence[dict], metric: str) -> tuple[float, ...]:
    if metric in GRADED:
        return tuple(round(item["right"], SCORE_DIGITS) for item in items)
    return tuple(bool(item["right"]) for item in items)


def write(results: Results, file: Path) -> None:
    answered = []
    for a in results.answered.values():
        graded = results.tasks[a.task]["metric"] in GRADED
        scored = {"scores": a.right} if graded else {"right": "".join("01"[right] for right in a.right)}
        answered.append({"run": a.run, "task": a.task, "answers": a.answers} | scored)
    lines = [{"facts": results.facts}, *results.tasks.values(), *answered]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same answers, the same bytes


def _stored(folder: Path) -> dict[tuple[str, str], list[dict]]:
    """{(run, task): items} of a folder of `evaluate`; ValueError when there are two of a kind."""
    found: dict[tuple[str, str], list[dict]] = {}
    for file in sorted(folder.glob("answers/*/*.jsonl")):
        header, *items = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        key = header["settings"]["run"], header["settings"]["task"]
        if key in found:
            raise ValueError(
                f"{file.parent} holds answers of {key[0]} with several experts or settings: delete the old"
            )
        found[key] = items
    return found


def read(file: Path) -> Results:
    facts, tasks, answered = {}, {}, {}
    for line in map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines()):
        if "facts" in line:
            facts = line["facts"]
        elif "run" in line:
            right = tuple(line["scores"]) if "scores" in line else tuple(mark == "1" for mark in line["right"])
            found = Answered(line["run"], line["task"], tuple(line["answers"]), right)
            answered[found.run, found.task] = found
        else:
            tasks[line["task"]] = line
    return Results(facts, tasks, answered)


def read_all(folder: Path = FOLDER, files: str = FILES) -> dict[int, Results]:
    """{experts in the pool: its results}, the smallest first."""
    found = {len(results.facts["experts"]): results for results in map(read, folder.glob(files))}
    return dict(sorted(found.items()))


def together(found: Sequence[Results]) -> Results | None:
    """Of one pool, the tasks of all of them with the rows that all answered; None of none."""
    if not found:
        return None
    runs = [run for run in found[0].runs if all(run in results.runs for results in found)]
    tasks = {name: task for results in found for name, task in results.tasks.items()}
    answered = {key: a for results in found for key, a in results.answered.items() if key[0] in runs}
    return Results(found[0].facts, tasks, answered)


def main_pool(pools: dict[int, Results]) -> Results:
    """The largest whose experts' own tasks were asked too."""
    sizes = [size for size, results in pools.items() if results.part("train")]
    if not sizes:
        raise ValueError(f"expected a {FILES} with held-in tasks; there are pools of {list(pools) or 'no size'}")
    return pools[max(sizes)]


def file_of(folder: Path, experts: int, files: str = FILES) -> Path:
    return folder / files.replace("*", str(experts))
