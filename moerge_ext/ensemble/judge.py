"""Whether an answer is right, and the label matrix that a router learns from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.metrics import exact_match
from ..queries.embedder import Embedder
from ..queries.vectors import unit

Judge = Callable[[str, str, str], bool]  # (question, answer, gold) -> right?
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(question: str, answer: str, gold: str) -> bool:
    """The same text, apart from white space at the ends."""
    return exact_match(answer, gold)


def numeric(question: str, answer: str, gold: str) -> bool:
    """The last number of the answer equals the last number of the gold answer, as GSM8K is scored."""
    mine, right = number(answer), number(gold)
    if right is None:
        raise ValueError(f"the numeric judge needs a number in the gold answer, got {gold[:80]!r}; use another judge")
    return mine == right


def number(text: str) -> float | None:
    """The last number in a text ("$1,200.50." -> 1200.5), or None."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


JUDGES: dict[str, Judge] = {"exact": exact, "numeric": numeric}


def judged(judge: Judge, questions: Sequence[str], answers: Sequence[Sequence[str]], golds: Sequence[str]) -> Tensor:
    """[M,N] bool: whether expert n answered question m right; answers: M lists of N.

    ValueError when the lists do not fit, or the judge says anything but True or False.
    """
    counts = {len(row) for row in answers}
    if not len(questions) == len(answers) == len(golds) or len(counts) != 1:
        raise ValueError(
            f"expected as many questions as answers and golds, and equally many answers to each; got {len(questions)}, "
            f"{len(answers)}, {len(golds)}, answers per question {sorted(counts)}"
        )
    rows: list[list[bool]] = []
    for question, given, gold in zip(questions, answers, golds, strict=True):
        said: list[Any] = [judge(question, answer, gold) for answer in given]
        wrong = [value for value in said if not isinstance(value, bool)]
        if wrong:
            raise ValueError(f"a judge must answer True or False, got {wrong[0]!r}")
        rows.append(said)
    return torch.tensor(rows)


def label_matrix(
    right: Tensor,
    answers: Sequence[Sequence[str]],
    golds: Sequence[str],
    names: Sequence[str],
    *,
    embedder: Embedder | None = None,
    theta: float | None = None,
) -> Tensor:
    """right [M,N] bool -> labels [M,N] bool in which every row has an expert.

    Rows in which nobody is right, and only those, get PELMo's fallback: answers and gold are embedded; an answer whose
    cosine to the gold is above theta counts as right, and when there is none, the most similar one does.

    theta depends on the embedder, so it has no default: ValueError when it (or the embedder) is needed and missing.
    Warns of experts that are never right: weak ones, which stay.
    """
    if right.dim() != 2 or right.shape != (len(golds), len(names)):
        raise ValueError(f"labels must be [M={len(golds)}, N={len(names)}], got {list(right.shape)}")
    weak = [name for name, column in zip(names, right.T, strict=True) if not column.any()]
    if weak:
        warnings.warn(f"never right on these questions: {', '.join(weak)}; weak experts, kept", stacklevel=2)
    lost = (~right.any(1)).nonzero().flatten().tolist()
    if not lost:
        return right.clone()
    if embedder is None or theta is None:
        raise ValueError(
            f"in {len(lost)} of {len(golds)} questions no expert is right: pass an embedder and theta, the similarity "
            "above which an answer counts as right (it depends on the embedder)"
        )
    if not -1 <= theta <= 1:
        raise ValueError(f"theta is a cosine and must be in [-1, 1], got {theta}")
    labels = right.clone()
    for m in lost:
        similar = _similarities(embedder, answers[m], golds[m])
        chosen = similar > theta
        if not chosen.any():
            chosen[similar.argmax()] = True
        labels[m] = chosen
    return labels


def _similarities(embedder: Embedder, answers: Sequence[str], gold: str) -> Tensor:
    """[N] cosines of the answers to the gold; -1 for an empty answer, which has no embedding."""
    given = [i for i, answer in enumerate(answers) if answer.strip()]
    similar = torch.full((len(answers),), -1.0)
    if given:
        vectors = unit(embedder([gold, *(answers[i] for i in given)]))
        similar[given] = vectors[1:] @ vectors[0]
    return similar
