"""Means of rows over tasks and paired differences between rows, with bootstrap intervals, from item-level answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from bench.quality.real_answers import Results

RESAMPLES = 2000
PREFIX = "expert:"
ORACLE, BEST = "oracle_dataset", "best_individual"
Interval = tuple[float, float, float]  # value, low and high of 95 %, in percent


class Scores:
    """The rows that answered every task, `oracle_dataset` and `best_individual` made from those of the experts."""

    def __init__(self, results: Results):
        self.results = results
        names = list(results.tasks)
        whole = [run for run in results.runs if all((run, name) in results.answered for name in names)]
        self.experts = [run for run in whole if run.startswith(PREFIX)]
        self._right = {
            (run, name): np.array(results.answered[run, name].right, dtype=float) for run in whole for name in names
        }
        self.rows = [run for run in whole if run not in self.experts]
        self.known: set[str] = {*whole, *([ORACLE, BEST] if self.experts else [])}
        if self.experts:
            self._derive(names)

    def _derive(self, names: Sequence[str]) -> None:
        """Chosen on the evaluation set itself: what one expert per task, and one for all, could reach."""
        best = max(self.experts, key=lambda run: sum(self._right[run, name].mean() for name in names))
        for name in names:
            own = max(self.experts, key=lambda run: self._right[run, name].mean())
            self._right[ORACLE, name], self._right[BEST, name] = self._right[own, name], self._right[best, name]
        self.rows += [ORACLE, BEST]

    def mean(self, row: str, names: Sequence[str]) -> Interval:
        return self._interval([self._right[row, name] for name in names])

    def difference(self, row: str, other: str, names: Sequence[str]) -> Interval:
        """Of the same items: paired."""
        return self._interval([self._right[row, name] - self._right[other, name] for name in names])

    def _interval(self, values: Sequence[np.ndarray]) -> Interval:
        """Mean of the tasks' means; the items of every task drawn anew, the tasks fixed."""
        drawn = np.mean([v[_draws(len(v))].mean(axis=1) for v in values], axis=0) if values else np.zeros(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return 100 * float(np.mean([v.mean() for v in values])), 100 * float(low), 100 * float(high)


@cache
def _draws(n: int) -> np.ndarray:
    """[RESAMPLES, n] item numbers."""
    return np.random.default_rng(n).integers(0, n, (RESAMPLES, n))
