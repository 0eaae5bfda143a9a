"""Rows as the hub's data sets have them, to rows of a task: {"input", "target"}, perhaps "choices" and "targets".

Each function takes a row of one layout, returns the task's row, or None for one that cannot be used (no answer, no
input). "targets" are all answers that count as right, where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Layout = Callable[[Row], dict[str, Any] | None]
COLUMNS: dict[Layout, tuple[str, ...]] = {}  # what a layout reads


def reads(*columns: str) -> Callable[[Layout], Layout]:
    """Declare the columns that a layout needs."""

    def declare(layout: Layout) -> Layout:
        COLUMNS[layout] = columns
        return layout

    return declare


@reads("inputs_pretokenized", "targets_pretokenized")
def p3(row: Row) -> dict[str, Any] | None:
    """bigscience/P3 (Sanh et al. 2021, arXiv 2110.08207): a prompted example, with the choices of its prompt if any."""
    made = _pair(row["inputs_pretokenized"], row["targets_pretokenized"])
    choices = [choice.strip() for choice in row.get("answer_choices") or ()]
    return made if made is None or made["target"] not in choices else {**made, "choices": choices}


@reads("inputs", "targets")
def flan(row: Row) -> dict[str, Any] | None:
    """Muennighoff/flan and Muennighoff/natural-instructions: a prompted example; the latter's with its definition."""
    definition = (row.get("definition") or "").strip()
    text = row["inputs"].strip()
    return _pair(f"{definition}\n\n{text}" if definition and text else text, row["targets"])


@reads("inputs", "targets", "multiple_choice_targets", "multiple_choice_scores")
def bigbench(row: Row) -> dict[str, Any] | None:
    """tasksource/bigbench (arXiv 2206.04615); the target is the first choice of the best score, without choices the
    longest target.
    """
    choices, scores = list(row["multiple_choice_targets"] or ()), list(row["multiple_choice_scores"] or ())
    if choices:
        if len(scores) != len(choices) or max(scores) <= 0:
            return None
        right = [choice.strip() for choice, score in zip(choices, scores, strict=True) if score == max(scores)]
        made = _pair(row["inputs"], right[0])
        made = made and {**made, "choices": list(dict.fromkeys(choice.strip() for choice in choices))}
    else:
        right = [target.strip() for target in row["targets"] or ()]
        made = _pair(row["inputs"], max(right, key=len, default=""))
    return made and _several(made, right)


@reads("input", "target")
def bbh(row: Row) -> dict[str, Any] | None:
    """SaylorTwift/bbh (Suzgun et al. 2022, arXiv 2210.09261)."""
    return _pair(row["input"], row["target"])


@reads("question", "answer")
def nq_open(row: Row) -> dict[str, Any] | None:
    """google-research-datasets/nq_open: a question and its answers, in other words."""
    answers = [answer.strip() for answer in row["answer"] or ()]
    made = _pair(row["question"], answers[0] if answers else "")
    return made and _several(made, answers)


@reads("question", "answer")
def hotpotqa(row: Row) -> dict[str, Any] | None:
    """hotpotqa/hotpot_qa: the question alone, without its paragraphs. It has no "rationale" (chain of thought)."""
    return _pair(row["question"], row["answer"] or "")


@reads("question", "choices", "answerKey")
def commonsense_qa(row: Row) -> dict[str, Any] | None:
    """tau/commonsense_qa: the question with its five choices; the target is the text of the right one."""
    labels, texts = row["choices"]["label"], [text.strip() for text in row["choices"]["text"]]
    if row["answerKey"] not in labels:
        return None  # the test split has no answers
    asked = "\n".join([row["question"].strip(), "Choices:", *(f"- {text}" for text in texts)])
    made = _pair(asked, texts[labels.index(row["answerKey"])])
    return made and {**made, "choices": list(dict.fromkeys(texts))}


@reads("question", "answer")
def gsm8k(row: Row) -> dict[str, Any] | None:
    """openai/gsm8k: the target is the number behind "####", the steps before it are "rationale"."""
    steps, mark, number = row["answer"].rpartition("####")
    made = _pair(row["question"], number.strip().replace(",", "") if mark else "")
    return made and {**made, "rationale": steps.strip()}


def check_columns(layout: Layout, found: list[str], where: str) -> None:
    """ValueError when the data set `where` lacks a column that the layout reads."""
    missing = [column for column in COLUMNS[layout] if column not in found]
    if missing:
        raise ValueError(
            f"{where} must have the columns {', '.join(COLUMNS[layout])}; it lacks {', '.join(missing)}, "
            f"and has {', '.join(found) or 'none'}"
        )


def _pair(text: str, target: str) -> dict[str, Any] | None:
    made = {"input": text.strip(), "target": target.strip()}
    return made if all(made.values()) else None


def _several(made: dict[str, Any], right: list[str]) -> dict[str, Any]:
    right = list(dict.fromkeys(answer for answer in right if answer))
    return {**made, "targets": right} if len(right) > 1 else made
