"""How good every expert's answer to every question was: what routers of texts are trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.counting import counted
from ..files.rows import MAX_LISTED, parse_json, read_text

FORM = '{"input": str, "scores": {name: number, ...}} and perhaps "task": str, "tags": [str, ...]'


@dataclass(frozen=True)
class Judged:
    """M questions answered by E experts or models.

    texts: the questions; scores [M,E] float32: 1 for a right answer and 0 for a wrong one, or rewards of any size;
    names: the experts; tasks: the data set that each question is from; tags: those of each question (Zooter).

    ValueError when they do not fit each other.
    """

    texts: tuple[str, ...]
    scores: Tensor
    names: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    tags: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        scores = torch.as_tensor(self.scores, dtype=torch.float32, device="cpu")
        object.__setattr__(self, "scores", scores)
        for name in ("texts", "names", "tasks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        count, problems = len(self.texts), []
        if not count or len(set(self.names)) != len(self.names) or not self.names:
            problems.append(f"expected questions and distinct names of experts, got {count} and {list(self.names)}")
        if list(scores.shape) != [count, len(self.names)] or not scores.isfinite().all():
            problems.append(f"scores must be finite numbers [M={count}, E={len(self.names)}], got {list(scores.shape)}")
        if not all(isinstance(text, str) and text.strip() for text in self.texts):
            problems.append("every question must be a text that is not empty")
        for name in ("tasks", "tags"):
            if getattr(self, name) and len(getattr(self, name)) != count:
                problems.append(f"{name} must be one per question, {count}, got {len(getattr(self, name))}")
        if problems:
            raise ValueError("judged answers: " + "; ".join(problems))

    def check_differing(self, kind: str) -> None:
        """ValueError where every expert has the same score on every question."""
        if bool((self.scores == self.scores[:, :1]).all()):
            raise ValueError(
                f"{kind} learns from questions on which experts differ, and here there is none: every expert has the "
                f"same score on each of {counted(len(self.texts), 'question')}"
            )

    def correctness(self) -> Tensor:
        """The scores [M,E]; ValueError for rewards outside 0 .. 1."""
        if self.scores.min() < 0 or self.scores.max() > 1:
            raise ValueError(
                f"this router learns from scores between 0 (wrong) and 1 (right), got {self.scores.min():g} to "
                f"{self.scores.max():g}; rewards are for zooter"
            )
        return self.scores


def read_judged(path: Path) -> Judged:
    """Judged answers from JSON lines `FORM`, every line with scores of the same names; ValueError lists bad lines."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected JSON lines {FORM}")
    rows, problems = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        if wrong := _wrong(row, rows[0] if rows else None):
            problems.append(f"line {number}: {wrong}")
        else:
            rows.append(row)
    if not rows and not problems:
        problems.append("the file has no rows")
    if problems:
        more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(f"{path} cannot be used:\n- " + "\n- ".join(problems[:MAX_LISTED] + more))
    names = tuple(rows[0]["scores"])
    return Judged(
        texts=tuple(row["input"] for row in rows),
        scores=torch.tensor(
            [[float(row["scores"][name]) for name in names] for row in rows], dtype=torch.float32, device="cpu"
        ),
        names=names,
        tasks=tuple(row["task"] for row in rows) if all("task" in row for row in rows) else (),
        tags=tuple(tuple(row.get("tags", ())) for row in rows) if any("tags" in row for row in rows) else (),
    )


def _wrong(row: object, first: dict | None) -> str:
    """What is wrong with a line, "" for nothing."""
    if not isinstance(row, dict) or not isinstance(row.get("input"), str) or not row["input"].strip():
        return f"expected {FORM}"
    scores = row.get("scores")
    if not isinstance(scores, dict) or not scores or not all(_is_number(value) for value in scores.values()):
        return f'"scores" must be numbers by name, got {scores!r:.100}'
    if first is not None and set(scores) != set(first["scores"]):
        return f"scores of {', '.join(sorted(scores))}, where the first line has {', '.join(sorted(first['scores']))}"
    if first is not None and ("task" in row) != ("task" in first):
        has, other = ("a", "none") if "task" in row else ("no", "one")
        return f'it has {has} "task", and the first line has {other}'
    if not isinstance(row.get("task", ""), str):
        return f'"task" must be a text, got {row["task"]!r:.100}'
    tags = row.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return f'"tags" must be a list of texts, got {tags!r:.100}'
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")


def joined(parts: Sequence[Judged]) -> Judged:
    """Several sets of judged answers of the same experts as one; ValueError when the names differ."""
    names = parts[0].names
    others = [part.names for part in parts if set(part.names) != set(names)]
    if others:
        raise ValueError(f"judged answers of {', '.join(names)} cannot be joined with those of {', '.join(others[0])}")
    scores = [part.scores[:, [part.names.index(name) for name in names]] for part in parts]
    every = {
        field: tuple(item for part in parts for item in getattr(part, field))
        if all(getattr(part, field) for part in parts)
        else ()
        for field in ("tasks", "tags")
    }
    return Judged(tuple(t for part in parts for t in part.texts), torch.cat(scores), names, **every)
