"""How right an answer is, and how sure a share of right answers is."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def exact_match(answer: str, target: str) -> bool:
    """The same characters, apart from white space at both ends."""
    return answer.strip() == target.strip()


def accuracy(answer: str, target: str) -> bool:
    """The same word or phrase: case, surrounding white space and a final full stop do not count."""
    return _plain(answer) == _plain(target)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def f1(answer: str, target: str) -> float:
    """The harmonic mean of precision and recall over words, without case, punctuation and articles, as SQuAD's script.

    Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    said, wanted = Counter(_words(answer)), Counter(_words(target))
    if not said or not wanted:
        return float(said == wanted)
    return 2 * (said & wanted).total() / (said.total() + wanted.total())


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge(answer: str, target: str, *, kind: str) -> float:
    """The F-measure of ROUGE (Lin 2004) by the package rouge-score, with its stemmer."""
    return _scorer(kind).score(target, answer)[kind].fmeasure


@cache
def _scorer(kind: str):
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError(f'metric {kind!r} needs rouge-score: pip install "moerge_ext[rouge]"') from error
    return RougeScorer([kind], use_stemmer=True)


ROUGE = ("rouge1", "rouge2", "rougeL")
# of generated answers: (answer, target) -> 0 .. 1
SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "f1": f1,
    **{kind: partial(rouge, kind=kind) for kind in ROUGE},
}
METRICS = (*SCORES, "rank")
GRADED = ("f1", *ROUGE)  # an answer can be partly right


def check_metric(metric: str, targets: Sequence[str]) -> None:
    """ImportError with the install line for a metric whose package is missing; ValueError for targets it cannot see."""
    if metric not in ROUGE:
        return
    _scorer(metric)
    unseen = [i for i, target in enumerate(targets) if not re.search("[a-z0-9]", target.lower())]
    if unseen:
        raise ValueError(
            f"{metric} reads the letters a to z and digits alone, and the target of row {unseen[0]} (from 0) has none: "
            "choose another metric"
        )


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `right` among n (Wilson 1927, the score interval): inside [0, 1] also for 0 and n.

    Where answers can be partly right, `right` is the sum; their variance is at most that of right or wrong, so the
    interval is then wider than it need be, never narrower.
    """
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of ours - theirs over the same items, each in [0, 1]: the normal 95 % interval of the mean.

    It is too narrow for fewer than some twenty items; one item alone has all of [-1, 1].
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected two equally long lists of results, got {len(ours)} and {len(theirs)}")
    differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    if n == 1:
        return mean, -1.0, 1.0
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = Z * math.sqrt(variance / n)
    return mean, max(-1.0, mean - half), min(1.0, mean + half)
