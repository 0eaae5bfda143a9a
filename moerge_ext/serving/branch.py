"""The experts of one module, added to a rank's share of an engine's layer.

    y_t += sum_k w_tk (B_e A_e x_t + bias_e)          w, e = route(x_t), or what t's request says

y [T,size] is a slice of the columns of the layer's output, written where it is. Where ranks share the input features
(row parallel), each has x [T,D/ranks]: the scores are reduced over ranks before anything is chosen, and each adds its
part of B A x to its part of the layer's output, which the layer's own reduction then sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..methods.base import Plan, Routing
from ..ops.options import BRANCH, filled
from ..routing.partial_scores import Reduce, chosen, partial_scores
from ..routing.routed_linear import bank_laid_out, laid_out
from ..routing.shares import Share
from .tables import Tables

DEFAULTS = tuple(BRANCH.values())


@dataclass(frozen=True)
class Variant:
    """One method on one module: the plan of this rank and the options of `route` (None: weights are fixed).

    own: whether the plan's factors are the method's, where those of others are the experts' own
    ids: the experts that the rows of the plan's bank are; None where they are of no expert in particular
    """

    name: str
    plan: Plan
    options: dict[str, Any] | None
    factored: bool
    own: bool = False
    ids: tuple[int, ...] | None = None


class Bank:
    """The factors of experts as the ops take them."""

    def __init__(self, plan: Plan, device: torch.device):
        self.lora_A, self.lora_B = bank_laid_out(plan.lora_A.to(device), plan.lora_B.to(device), device)
        self.lora_bias = None if plan.lora_bias is None else plan.lora_bias.to(device)

    def stacked(self) -> dict[str, Tensor | None]:
        return {"lora_A": self.lora_A, "lora_B": self.lora_B, "lora_bias": self.lora_bias}


def route_options(routing: Routing | None, in_features: int, num_experts: int) -> dict[str, Any] | None:
    """The options of `route` on a layer of D=`in_features`; None for a method that routes nothing."""
    if routing is None:
        return None
    return {
        "top_k": num_experts if routing.top_k is None else routing.top_k,
        "normalize": routing.normalize,
        "absolute": routing.absolute,
        "scale": routing.resolved_scale(in_features, num_experts),
        "top_p": routing.top_p,
        "weighting": routing.weighting,
    }


class Branch:
    """The experts of one module for a whole input x [T,D]."""

    def __init__(self, path: str, share: Share, variants: list[Variant], tables: Tables, device: torch.device):
        self.path, self.start, self.size, self.tables = path, share.offset, share.size, tables
        whole = next((v.plan for v in variants if v.options is not None and not v.own), None)
        # the experts one by one, for requests that weigh them and for all methods that route among them
        self.bank = None if whole is None else Bank(whole, device)
        self.routes = [_route(self, variant, device) for variant in variants]

    def stacked(self) -> dict[str, dict[str, Tensor]]:
        """The tensors that have a slot [slots, ...] for every expert: the factors under "", each method's own under its
        name."""
        found = {"": self.bank.stacked()} | {route.name: route.stacked() for route in self.routes}
        return {name: {key: t for key, t in held.items() if t is not None} for name, held in found.items()}

    def choose(self, options: Mapping[str, dict[str, Any]]) -> None:
        """Routes by these options {method: options of `route`} and by what the slots' masks hold."""
        for route in self.routes:
            route.choose(options[route.name])

    def add(self, y: Tensor, x: Tensor) -> None:
        """Into y [T, all features of the layer], for x [T,D]."""
        part = y if y.shape[-1] == self.size else y.narrow(-1, self.start, self.size)
        tables = self.tables
        if tables.seen is not None:
            self._add_seen(part, x, None if tables.plain else tables.rows(x.shape[0]))
            return
        if tables.plain:
            self.routes[0].add(part, x)
            return
        rows = tables.rows(x.shape[0])
        for route in self.routes:
            if tables.used[route.name]:
                route.add_rows(part, x, rows)
        if self.bank is not None and tables.weighted:
            self._weigh(part, x, rows)

    def _weigh(self, part: Tensor, x: Tensor, rows: Tensor) -> None:
        """The experts with the weights that requests brought."""
        bank, tables = self.bank, self.tables
        options = {"lora_bias": bank.lora_bias, "rows": rows}
        ops.lora_apply_(part, x, bank.lora_A, bank.lora_B, tables.weights, tables.experts, **options)

    def _add_seen(self, part: Tensor, x: Tensor, rows: Tensor | None) -> None:
        """`add` in a step of which somebody wants to know what was chosen; rows: None where all is of the default."""
        tables = self.tables
        for route in self.routes[:1] if rows is None else self.routes:
            chosen = route.add_seen(part, x, rows) if rows is None or tables.used[route.name] else None
            if chosen is not None:
                tables.seen.add(self.path, route.name, *chosen, route.masked)
        if rows is not None and self.bank is not None and tables.weighted:
            self._weigh(part, x, rows)
            mine = rows.long()
            tables.seen.add(self.path, None, tables.weights[mine], tables.experts[mine])

    def ways(self, dtype: torch.dtype) -> list[str]:
        """Which kernels run for many tokens of a type, and why not faster ones."""
        route = self.routes[0]
        if isinstance(route, _Fixed):
            return ["fixed weights: the same experts for every token"]
        if isinstance(route, _PartlyRouted):
            return ["ranks share the input features: scores are reduced over ranks, then experts are applied by an op"]
        x = torch.empty(512, route.bank.lora_A.shape[2], dtype=dtype, device=route.bank.lora_A.device)
        return route.ways(x.new_empty(512, self.size), x)


class _Routed:
    """A method that chooses for each token."""

    def __init__(self, branch: Branch, variant: Variant, device: torch.device):
        plan = variant.plan
        self.name, self._branch, self._factored = variant.name, branch, variant.factored
        self.bank = Bank(plan, device) if variant.own else branch.bank
        self._gates = laid_out(plan.gates.to(device), device)
        self._mask = None if plan.mask is None else plan.mask.to(device)
        self.choose(variant.options)

    def stacked(self) -> dict[str, Tensor | None]:
        return {"gates": self._gates, "mask": self._mask}

    def choose(self, options: dict[str, Any]) -> None:
        branch, name, mask = self._branch, self.name, self._mask
        kept = options | {"lora_bias": self.bank.lora_bias, "factored": self._factored}
        head = self._head = (self._gates, self.bank.lora_A, self.bank.lora_B)
        self._plain = kept | {"mask": mask}
        self._made = _shortened((*head, *filled(BRANCH, self._plain).values()))
        self._by_rows = kept | {"bias": branch.tables.bias.get(name), "mask": branch.tables.allowed(name, mask)}
        made = (*head, *filled(BRANCH, self._by_rows).values())
        at = len(head) + list(BRANCH).index("rows")
        self.masked = _masked(branch, mask)
        self._before, self._after = made[:at], made[at + 1 :]

    def add(self, y: Tensor, x: Tensor) -> None:
        try:
            ops.ROUTED_LORA_(y, x, *self._made)
        except RuntimeError as error:
            raise ops.explained(error, ops.ROUTED_LORA_, (y, x, *self._made)) from None

    def add_rows(self, y: Tensor, x: Tensor, rows: Tensor) -> None:
        ops.call(ops.ROUTED_LORA_, y, x, *self._before, rows, *self._after)

    def add_seen(self, y: Tensor, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """`add` or `add_rows`, and what was chosen: weights [T,K], experts [T,K]."""
        options = self._plain if rows is None else self._by_rows | {"rows": rows}
        result, weights, experts = ops.routed_lora(y, x, *self._head, **options)
        y.copy_(result)
        return weights, experts

    def ways(self, y: Tensor, x: Tensor) -> list[str]:
        named = dict(zip(BRANCH, self._made[3:], strict=False))
        return ops.routed_lora_ways(y, x, *self._made[:3], **named)


class _Fixed:
    """A method that routes nothing: one bank of its own with the same weights for all tokens."""

    masked = 0

    def __init__(self, branch: Branch, variant: Variant, device: torch.device):
        plan = variant.plan
        self.name, self._tables = variant.name, branch.tables
        self._bank = bank_laid_out(plan.lora_A.to(device), plan.lora_B.to(device), device)
        self._weights = plan.weights.float()[None].to(device)
        self._experts = torch.arange(plan.weights.shape[0], dtype=torch.int32, device=device)[None]
        named = variant.ids
        self._named = None if named is None else torch.tensor([named], dtype=torch.int32, device=device)
        bias = None if plan.lora_bias is None else plan.lora_bias.to(device)
        self._options = {"lora_bias": bias, "factored": variant.factored}

    def add(self, y: Tensor, x: Tensor) -> None:
        ops.lora_apply_(y, x, *self._bank, self._weights, self._experts, **self._options)

    def add_rows(self, y: Tensor, x: Tensor, rows: Tensor) -> None:
        weights = self._tables.allowed(self.name, None)[:, :1] * self._weights
        experts = self._experts.expand(weights.shape[0], -1).contiguous()
        ops.lora_apply_(y, x, *self._bank, weights, experts, rows=rows, **self._options)

    def add_seen(self, y: Tensor, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """`add` or `add_rows`, and the experts with their weights; None where they are merged."""
        weights = self._weights.expand(x.shape[0], -1)
        if rows is None:
            self.add(y, x)
        else:
            self.add_rows(y, x, rows)
            weights = weights * self._tables.allowed(self.name, None)[rows.long(), :1]
        return None if self._named is None else (weights, self._named.expand(x.shape[0], -1))


class PartialBranch(Branch):
    """The experts of one module whose input features are shared out: x [T,D/ranks].

    whole: D. gate_sums: {variant: [E] float64, the sum of every gate over all D}.
    """

    def __init__(
        self,
        path: str,
        share: Share,
        variants: list[Variant],
        tables: Tables,
        device: torch.device,
        *,
        whole: int,
        gate_sums: dict[str, Tensor],
        reduce: Reduce,
    ):
        self.whole, self.gate_sums, self.reduce = whole, gate_sums, reduce
        super().__init__(path, share, variants, tables, device)


class _PartlyRouted:
    """`_Routed` where a rank has a part of the features of x."""

    def __init__(self, branch: PartialBranch, variant: Variant, device: torch.device):
        plan = variant.plan
        self.name, self._branch, self._factored = variant.name, branch, variant.factored
        self.bank = Bank(plan, device) if variant.own else branch.bank
        self._gates = plan.gates.to(device, torch.float64).t().contiguous()
        self._gate_sums = branch.gate_sums[variant.name].to(device)
        self._mask = None if plan.mask is None else plan.mask.to(device)
        self.choose(variant.options)

    def stacked(self) -> dict[str, Tensor | None]:
        return {"gates": self._gates.t(), "gate_sums": self._gate_sums, "mask": self._mask}

    def choose(self, options: dict[str, Any]) -> None:
        self._options, self._allowed = options, self._branch.tables.allowed(self.name, self._mask)
        self.masked = _masked(self._branch, self._mask)

    def add(self, y: Tensor, x: Tensor) -> None:
        self.add_seen(y, x, None)

    def add_rows(self, y: Tensor, x: Tensor, rows: Tensor) -> None:
        self.add_seen(y, x, rows)

    def add_seen(self, y: Tensor, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        branch = self._branch
        scores = partial_scores(x, self._gates, self._gate_sums, branch.whole, self._options, branch.reduce)
        bias = branch.tables.bias.get(self.name)
        if rows is None:
            return self._add(y, x, scores, self._mask)
        rows = rows.long()
        return self._add(y, x, scores if bias is None else scores + bias[rows], self._allowed[rows])

    def _add(self, y: Tensor, x: Tensor, scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        weights, experts = chosen(ops, scores, self._options, mask)
        applied = {"lora_bias": self.bank.lora_bias, "factored": self._factored}
        ops.lora_apply_(y, x, self.bank.lora_A, self.bank.lora_B, weights, experts, **applied)
        return weights, experts


def _shortened(made: tuple) -> tuple:
    """The arguments of routed_lora_ after base and x, without those at the end that are the op's own defaults: each
    argument of a call costs (this and no wrapper around the op: 20 and not 25 microseconds for one token, 576 -> 192).
    """
    while not isinstance(made[-1], Tensor) and made[-1] == DEFAULTS[len(made) - 4]:
        made = made[:-1]
    return made


def _masked(branch: Branch, mask: Tensor | None) -> int:
    """How many of the experts there are can never be chosen in a module."""
    return 0 if mask is None else branch.tables.count - int(mask.sum())


def _route(branch: Branch, variant: Variant, device: torch.device) -> _Routed | _Fixed | _PartlyRouted:
    if variant.options is None:
        return _Fixed(branch, variant, device)
    kind = _PartlyRouted if isinstance(branch, PartialBranch) else _Routed
    return kind(branch, variant, device)
