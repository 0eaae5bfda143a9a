"""Where the tokens of tasks go, and how far that is from the best expert (PHATGOOSE, arXiv 2402.05859, section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.prompt_notes import warn_of_other_prompts
from ..methods import get_method
from .answers import Answerer
from .asked_routers import row_queries, show_similar, task_queries
from .checks import check_prompts
from .evaluate import Settings, check_runs, label, patched
from .probe import TINY, ModuleSums, probe
from .runs import Run
from .tasks import Task


@dataclass(frozen=True)
class Inspection:
    """One run on one task.

    modules: sums of every routed module; experts: their names; oracle: the best expert of the task, or None.
    """

    method: str
    task: str
    experts: tuple[str, ...]
    oracle: str | None
    modules: dict[str, ModuleSums]

    def shares_of(self, modules: Sequence[str]) -> Tensor:
        """[modules,E] float64: the mean distributions of these modules."""
        return torch.stack([self.modules[name].distribution / self.modules[name].tokens for name in modules])

    @property
    def entropy(self) -> float:
        """Nats, averaged over tokens and modules; log E is uniform."""
        return _mean([m.entropy / m.tokens for m in self.modules.values()])

    @property
    def divergence(self) -> float | None:
        """KL(oracle || routing), nats, as PHATGOOSE's section 4.4 has it; log E for uniform routing.

        The probabilities of all tokens in all modules are averaged first, and p is their mean: -log p[oracle], as the
        oracle always picks one.
        """
        if self.oracle is None:
            return None
        index, tokens = self.experts.index(self.oracle), sum(m.tokens for m in self.modules.values())
        p = sum(m.distribution[index].item() for m in self.modules.values()) / tokens
        return -math.log(max(p, TINY))

    @property
    def token_divergence(self) -> float | None:
        """KL(oracle || routing) of every token in every module, nats, averaged: never below `divergence` (Jensen)
        when all modules see the same tokens.
        """
        if self.oracle is None:
            return None
        index = self.experts.index(self.oracle)
        return _mean([m.token_divergence(index) for m in self.modules.values()])

    @property
    def to_oracle(self) -> float | None:
        """The part of the applied weight that the oracle gets."""
        if self.oracle is None:
            return None
        total = sum(m.weight.abs() for m in self.modules.values())
        return (total[self.experts.index(self.oracle)] / total.sum().clamp_min(1e-30)).item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def inspect(
    model: nn.Module,
    tokenizer: Any,
    experts: ExpertBank,
    runs: Sequence[Run],
    tasks: Sequence[Task],
    settings: Settings | None = None,
    *,
    oracles: Mapping[str, str | None] | None = None,
    routers: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> list[Inspection]:
    """Every run on the rows of every task, prompt and target together, one sequence at a time (no padding).

    oracles: {task: expert, None for none}; default the expert of the task's name, if there is one. ValueError for an
    oracle that is no expert, and for a run that routes nothing.
    """
    settings = settings or Settings()
    oracles = dict(oracles or {})
    check_oracles(oracles, experts.names)
    for task in tasks:
        if task.name in experts.names:
            oracles.setdefault(task.name, task.name)
    check_routed(runs)
    check_runs(model, experts, runs, routers)
    answerer, found = Answerer(model, tokenizer), []
    check_prompts(answerer, tasks, settings.format, None, given=True)
    warn_of_other_prompts(experts, [settings.format.seen_in(task.rows) for task in tasks])
    total = len(runs) * sum(len(task.rows) for task in tasks)
    with tqdm(total=total, unit="item", disable=not progress) as bar:
        for run in runs:
            with patched(model, experts, run, routers) as handle:
                for task in tasks:
                    bar.set_description(f"{run.label}: {task.name}")
                    show_similar(getattr(handle, "router", None), task, settings)
                    with task_queries(handle, task, settings), probe(model) as sums:
                        for row in task.rows:
                            with row_queries(handle, [row], tokenizer):
                                prompt = settings.format.prompt(row, tokenizer)
                                answerer.log_likelihoods([prompt], [row["target"]], length_norm=True)
                            bar.update()
                    name = label(run, handle)
                    found.append(Inspection(name, task.name, experts.names, oracles.get(task.name), dict(sums)))
    return found


def check_oracles(oracles: Mapping[str, str | None], names: Sequence[str]) -> None:
    """ValueError for oracles that are no expert."""
    if unknown := sorted(set(oracles.values()) - {None, *names}):
        raise ValueError(f"oracles must be experts; there is no {', '.join(unknown)} among {', '.join(names)}")


def check_routed(runs: Sequence[Run]) -> None:
    """ValueError for runs that decide nothing by scores, whose weights nobody could look at."""
    unseen = [run.label for run in runs if run.apart or run.method is None or get_method(run.method).routing is None]
    if unseen:
        raise ValueError(
            f"{', '.join(unseen)}: this model routes nothing in its layers that could be shown (its weights are fixed, "
            "or its own routers compute them): leave that out"
        )


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None for fewer than three pairs or a side that is constant but for rounding."""
    if len(x) != len(y):
        raise ValueError(f"expected pairs, got {len(x)} and {len(y)} values")
    mean_x, mean_y = sum(x) / max(1, len(x)), sum(y) / max(1, len(y))
    xx, yy = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    if len(x) < 3 or any(max(side) - min(side) <= 1e-12 * max(map(abs, side)) for side in (x, y)):
        return None
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / math.sqrt(xx * yy)


def correlations(found: Sequence[Inspection], scores: Mapping[tuple[str, str], float]) -> dict[str, float | None]:
    """{method: Pearson's correlation over tasks of KL(oracle || routing) with `scores` {(method, task): share}}."""
    made = {}
    for method in dict.fromkeys(i.method for i in found):
        mine = [i for i in found if i.method == method and i.oracle and (method, i.task) in scores]
        made[method] = pearson([i.divergence for i in mine], [scores[method, i.task] for i in mine])
    return made
