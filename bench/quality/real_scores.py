"""Means of rows over tasks and paired differences between rows, with intervals, from item-level answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from bench.quality.real_answers import Results
from moerge_ext.evaluation.metrics import wilson
from moerge_ext.evaluation.report import mean

RESAMPLES = 2000
PREFIX = "expert:"
OPEN = 0.05  # right by chance at most, where answers are open
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
        return self.differences(row, other, names).interval

    def differences(self, row: str, other: str, names: Sequence[str], of: Scores | None = None) -> Differences:
        """Task by task; of: where `other` answered, if elsewhere. ValueError when that was asked other items."""
        of = of or self
        strange = [name for name in names if self.results.tasks[name]["targets"] != of.results.tasks[name]["targets"]]
        if strange:
            raise ValueError(f"{row} and {other} are paired by items, and were asked others of {', '.join(strange)}")
        values = [self._right[row, name] - of._right[other, name] for name in names]
        rng = np.random.default_rng(0)
        drawn = [v[rng.integers(0, len(v), (RESAMPLES, len(v)))].mean(axis=1) for v in values]
        return Differences(tuple(names), np.array([v.mean() for v in values]), np.array(drawn))

    def best(self, rows: Sequence[str], names: Sequence[str]) -> str:
        """The row with the largest mean."""
        return max(rows, key=lambda row: self.mean(row, names)[0])

    def telling(self, names: Sequence[str]) -> list[str]:
        """The tasks on which some row is told from chance, or from OPEN where answers are open."""
        return [name for name in names if any(self._low(row, name) > self._floor(name) for row in self.known)]

    def _low(self, row: str, name: str) -> float:
        right = self._right[row, name]
        return wilson(right.sum(), len(right))[0]

    def _floor(self, name: str) -> float:
        chance = self.results.tasks[name]["chance"]
        return OPEN if chance is None else chance


@dataclass(frozen=True)
class Differences:
    """Of two rows, for every task: the mean [tasks], and that of every resample [tasks, RESAMPLES]; parts of 1."""

    names: tuple[str, ...]
    values: np.ndarray
    drawn: np.ndarray

    @property
    def interval(self) -> Interval:
        low, high = np.quantile(np.mean(self.drawn, axis=0), [0.025, 0.975])
        return 100 * float(np.mean(self.values)), 100 * float(low), 100 * float(high)

    def without(self, name: str) -> Differences:
        kept = [i for i, known in enumerate(self.names) if known != name]
        return Differences(tuple(self.names[i] for i in kept), self.values[kept], self.drawn[kept])
