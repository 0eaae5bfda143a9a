"""Means of rows over tasks and paired differences between rows, with intervals, from item-level answers."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from bench.quality.real_answers import Results
from moerge_ext.evaluation.metrics import wilson
from moerge_ext.evaluation.report import mean

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
        """The mean of the tasks, with the interval that `moerge eval` gives it."""
        right = [self._right[row, name] for name in names]
        shares = [SimpleNamespace(value=r.mean(), interval=wilson(r.sum(), len(r))) for r in right]
        value, low, high = mean(shares)
        return 100 * value, 100 * low, 100 * high

    def difference(self, row: str, other: str, names: Sequence[str]) -> Interval:
        """Of the same items, paired: a bootstrap over the items of every task, the tasks fixed."""
        values = [self._right[row, name] - self._right[other, name] for name in names]
        rng = np.random.default_rng(0)
        drawn = [v[rng.integers(0, len(v), (RESAMPLES, len(v)))].mean(axis=1) for v in values]
        low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
        return 100 * float(np.mean([v.mean() for v in values])), 100 * float(low), 100 * float(high)
