"""When an answer is right, and how sure a share of right answers is."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def exact_match(answer: str, target: str) -> bool:
    """The same characters, apart from white space at both ends."""
    return answer.strip() == target.strip()


def accuracy(answer: str, target: str) -> bool:
    """The same word or phrase: case, surrounding white space and a final full stop do not count."""
    return _plain(answer) == _plain(target)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def wilson(right: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `right` among n (Wilson 1927, the score interval): inside [0, 1] also for 0 and n."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    centre = p + Z * Z / (2 * n)
    spread = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """(mean, low, high) of ours - theirs over the same items, with the normal 95 % interval of the mean."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected two equally long lists of results, got {len(ours)} and {len(theirs)}")
    differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / max(1, n - 1)
    half = Z * math.sqrt(variance / n)
    return mean, mean - half, mean + half
