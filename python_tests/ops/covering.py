"""A small set of cases in which every pair of values of any two axes occurs that a budget allows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

Axes = dict[str, tuple]
Case = dict[str, object]


def pairs_of(case: Case) -> set[tuple]:
    """Every two (axis, value) of a case."""
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def pairwise(axes: Axes, allowed: Callable[[Case], bool], tries: int = 60, seed: int = 0) -> list[Case]:
    """Greedy: each case holds one pair that is still missing, and of `tries` such cases brings most that are new.

    A pair for which none of the tries is allowed is given up.
    """
    source = random.Random(seed)
    missing = [pair for a, b in itertools.combinations(sorted(axes), 2)
               for pair in itertools.product([(a, v) for v in axes[a]], [(b, v) for v in axes[b]])]  # fmt: skip
    source.shuffle(missing)
    cases: list[Case] = []
    left = set(missing)
    for pair in missing:
        if pair not in left:
            continue
        drawn = ({n: source.choice(v) for n, v in axes.items()} | dict(pair) for _ in range(tries))
        fitting = [case for case in drawn if allowed(case)]
        if fitting:
            cases.append(max(fitting, key=lambda case: len(left & pairs_of(case))))
            left -= pairs_of(cases[-1])
    return cases
