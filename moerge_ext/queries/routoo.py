"""Routoo: the expert with the best predicted score that the budget allows.

Mohammadshahi et al. 2024, arXiv 2401.13979. A predictor says how good expert e is for question q, s_e(q); the choice

    maximizes sum_q s_{e(q)}(q)  under  mean_q cost_{e(q)} <= budget

Here e(q) = argmax_e s_e(q) - price cost_e with the smallest price that keeps to the budget on the questions of the
training: the Lagrangian of that problem, which needs no other questions to decide for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .judged import Judged
from .linear_heads import L2, fit_probabilities
from .text_router import Stored, TextRouter, described_experts, embedded


def costs_of(costs: Mapping[str, float] | None, names: Sequence[str]) -> Tensor:
    """[E] float32, 1 for all without `costs`; ValueError for names without one, unknown ones, and negative costs."""
    if costs is None:
        return torch.ones(len(names), dtype=torch.float32, device="cpu")
    problems = [f"no cost for {name}" for name in names if name not in costs]
    problems += [f"a cost for {name}, which is no expert here" for name in costs if name not in names]
    problems += [
        f"the cost of {name} must be finite and not negative, got {cost}"
        for name, cost in costs.items()
        if not 0 <= cost < float("inf")
    ]
    if problems:
        raise ValueError("costs: " + "; ".join(problems))
    return torch.tensor([float(costs[name]) for name in names], dtype=torch.float32, device="cpu")


def train_routoo(
    judged: Judged,
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    costs: Mapping[str, float] | None = None,
    c: float = L2,
) -> Path:
    """Fit a logistic regression per expert on scores in 0 .. 1, over the embedder's vectors; returns the file.

    costs: {name: per answer}, for whole models their price; 1 for all by default. ValueError for other experts, scores
    or costs.
    """
    marks, scores = described_experts(experts, judged.names), judged.correctness()
    judged.check_differing("routoo")
    prices = costs_of(costs, judged.names)
    vectors, probe = embedded(embedder, judged.texts)
    weight, bias = fit_probabilities(vectors, scores, c=c)
    predicted = (vectors @ weight.T + bias).sigmoid()
    tensors = {"weight": weight, "bias": bias, "probe": probe, "predicted": predicted, "costs": prices}
    return Stored("routoo", judged.names, tensors, {"c": c}, marks, embedder.name, embedder.max_length).save(output_dir)


def price_for(predicted: Tensor, costs: Tensor, budget: float) -> float:
    """The smallest price >= 0 at which the choices for predicted [M,E] cost [E] at most `budget` on average.

    ValueError for a budget below the cheapest expert's cost.
    """
    if budget < costs.min():
        raise ValueError(f"a budget of {budget:g} per answer is below the cheapest expert's cost, {costs.min():g}")
    gains = (predicted[:, :, None] - predicted[:, None, :]).double()
    dearer = (costs[:, None] - costs[None, :]).double()
    turns = (gains / dearer)[(dearer > 0).expand_as(gains) & (gains >= 0)].unique()  # where a choice can change
    prices = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), turns * (1 + 1e-6) + 1e-12])
    low, high = 0, len(prices) - 1
    while low < high:
        middle = (low + high) // 2
        if costs[_best(predicted, costs, prices[middle].item())].mean() <= budget + 1e-9:
            high = middle
        else:
            low = middle + 1
    return prices[low].item()


def _best(predicted: Tensor, costs: Tensor, price: float) -> Tensor:
    return (predicted.double() - price * costs.double()).argmax(1)


class RoutooRouter(TextRouter):
    """The expert with the best s_e(q) - price cost_e; option `budget` None takes the best s_e(q)."""

    kind = "routoo"

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the price of the budget; ValueError for one that no choice keeps to."""
        options = dict(options)
        tensors = self.stored.tensors
        budget = options["budget"]
        options["price"] = (
            0.0
            if budget is None
            else price_for(tensors["predicted"][:, self.order], tensors["costs"][self.order], budget)
        )
        return options

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        tensors = self.stored.tensors
        predicted = (self.embed(texts) @ tensors["weight"].T + tensors["bias"]).sigmoid()[:, self.order]
        # in float64, where the least price tells equal predictions apart
        return predicted.double() - options["price"] * tensors["costs"][self.order].double()
