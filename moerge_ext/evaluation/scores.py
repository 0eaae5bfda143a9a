"""One run's score on one task, and the baselines that are made from scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..methods.fixed import PREFIX
from .cost import Cost
from .metrics import wilson


@dataclass(frozen=True)
class Score:
    """`right` of `n` items; interval: the 95 % Wilson interval of the share; chance: of a guess, None if not known.

    Where an answer can be partly right (`GRADED` metrics), `right` is the sum of the items. reused: how many of the
    answers were stored before; cost: of all of them, None where that is not known.
    """

    method: str
    task: str
    part: str
    metric: str
    n: int
    right: float
    chance: float | None
    items: tuple[float, ...]
    reused: int = field(default=0, compare=False)
    cost: Cost | None = field(default=None, compare=False)

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


def derive(scores: Sequence[Score], baselines: Sequence[str]) -> list[Score]:
    """The scores of `oracle_dataset` and `best_individual`, from those of every `expert:<name>`."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    by_expert: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.method.startswith(PREFIX):
            by_expert.setdefault(score.method, {})[score.task] = score
    made = []
    for name in baselines:
        if name == "oracle_dataset":
            best = [max((s[task] for s in by_expert.values()), key=lambda s: s.value) for task in tasks]
        else:
            means = {e: sum(s.value for s in rows.values()) / len(rows) for e, rows in by_expert.items()}
            best = list(by_expert[max(means, key=means.get)].values())
        made += [replace(score, method=name, cost=None) for score in best]
    return made
