"""Questions with their right answers and the dataset that each is of."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.listing import listed
from .prompts import PromptExpert

GENERIC = ("train", "validation", "dev", "test")  # names of files that say nothing of what is in them


@dataclass(frozen=True)
class Question:
    """golds: the answers that are right, at least one; dataset: a column of the table; domain: the name of the expert
    that a single-label router should choose, None where the row names none.
    """

    text: str
    golds: tuple[str, ...]
    dataset: str = "questions"
    domain: str | None = None


def question_of(row: Mapping[str, Any], text: str, dataset: str) -> Question:
    """A row {"target"} as a question that is asked by `text`.

    Its "targets", a list of texts, are right answers too; "dataset" and "domain" are of the row where it has them.
    """
    more = row.get("targets", [])
    if not isinstance(more, list) or not all(isinstance(gold, str) for gold in more):
        raise ValueError(f'"targets" must be a list of texts, the right answers beside the target, got {more!r:.100}')
    for key in ("dataset", "domain"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f'"{key}" must be a text, got {row[key]!r:.100}')
    golds = tuple(dict.fromkeys([row["target"], *more]))
    return Question(text, golds, row.get("dataset", dataset), row.get("domain"))


def named_file(text: str) -> tuple[str, Path]:
    """(dataset, file) of "NAME=FILE" or "FILE", which is called by its stem, or, of nq/test.jsonl, by its folder."""
    name, equals, file = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, Path(file)
    path = Path(text)
    return (path.resolve().parent.name if path.stem in GENERIC else path.stem), path


def domains(
    questions: Sequence[Question], names: Sequence[str], by_dataset: Mapping[str, str] | None = None
) -> list[int]:
    """The expert id of every question: of its "domain", else of the expert of its dataset (`by_dataset`, or its name).

    ValueError for questions that belong to no expert.
    """
    own = {**{name: name for name in names}, **(by_dataset or {})}
    found = [question.domain or own.get(question.dataset) for question in questions]
    bad = [i for i, name in enumerate(found) if name not in names]
    if bad:
        first = questions[bad[0]]
        raise ValueError(
            f'a single-label router needs rows with "domain", one of {", ".join(names)}, or experts with "dataset"; '
            f"row {bad[0]} (from 0) has {first.domain!r} and is of the dataset {first.dataset!r} ({len(bad)} such rows)"
        )
    return [names.index(name) for name in found]


def split(questions: Sequence[Question], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(numbers of the rest, of a random `share`), drawn from every dataset alike; both in their old order.

    A dataset gives round(share x its questions), and keeps one at least.
    """
    by_dataset: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        by_dataset.setdefault(question.dataset, []).append(i)
    held: set[int] = set()
    for name in sorted(by_dataset):
        numbers = by_dataset[name]
        held |= set(random.Random(f"{seed} {name}").sample(numbers, min(round(share * len(numbers)), len(numbers) - 1)))
    return [i for i in range(len(questions)) if i not in held], sorted(held)


def warn_of_shown(questions: Sequence[Question], experts: Sequence[PromptExpert]) -> None:
    """Warn of questions that are demonstrations of an expert, who then sees their answers."""
    texts = {question.text for question in questions}
    seen = {}
    for expert in experts:
        shown = {row.get("input") for row in expert.facts.get("demonstrations", ())} & texts
        if shown:
            seen[expert.name] = len(shown)
    if seen:
        said = listed([f"{count} by {name}" for name, count in seen.items()], "expert")
        warnings.warn(
            f"some questions are shown with their answers, as demonstrations: {said}; take them out of the questions, "
            "or else these experts look better than they are",
            stacklevel=3,
        )
