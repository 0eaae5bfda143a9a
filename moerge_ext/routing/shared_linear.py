"""Routed layers of which every rank computes a part (`tensor_parallel.py`), in inference.

SharedLinear    a rank has all of x and a part of the output features, whose rows of B it holds: nothing is sent
PartialLinear   a rank has a part of x: the sums from which scores are made are added over ranks before anything is
                chosen, and so is what each rank's part of A makes of its part of x:

                    y_t = base(x)_t + sum over ranks of sum_k w_tk B_e A_e[:, part] x_t[part]

All ranks choose the same experts, by the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..methods.base import Plan, Routing
from .partial_scores import chosen, partial_scores
from .products import is_product
from .routed_linear import BACKENDS, RoutedLinear
from .routed_product import AT_PRODUCTS
from .shares import share_of_plan
from .state import Request
from .tensor_parallel import Place, is_parallel, mesh_group, place_of, sum_over
from .weighed_linear import layer_of

NO_GRADIENTS = (
    "{}: experts of a tensor parallel model are for inference: call it under torch.no_grad(), or train without tp_size"
)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedLinear(RoutedLinear):
    """A rank's part of the output features of a routed layer."""

    def __init__(self, base_layer: nn.Module, plan: Plan, routing: Routing | None, place: Place, **options: Any):
        super().__init__(base_layer, share_of_plan(plan, place.share), routing, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., D] -> [..., this rank's part of O]."""
        _refuse_gradients(self, x)
        return super().forward(x, *args, **kwargs)


class PartialLinear(RoutedLinear):
    """A routed layer of which a rank has a part of the input features."""

    why_apart = "ranks share the input features: scores and results are added over ranks"

    def __init__(self, base_layer: nn.Module, plan: Plan, routing: Routing | None, place: Place, **options: Any):
        mine = share_of_plan(plan, place.share, adds_bias=place.first)
        super().__init__(base_layer, mine, routing, **options)
        self._reduce = sum_over(place.group)
        self._gate_sums = None if plan.gates is None else plan.gates.double().sum(1)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., this rank's part of D] -> [..., O], the same on every rank."""
        _refuse_gradients(self, x)
        return self._add_branch(self.base_layer(x, *args, **kwargs), x, self.state.current())

    def _add_branch(self, base: Tensor, x: Tensor, request: Request) -> Tensor:
        if not request.enabled:
            return base
        self._check_result(base)
        kernels, held, tokens = BACKENDS[self.backend], self._held(), x.reshape(-1, x.shape[-1])
        weights, experts = held["weights"], held["experts"]
        if self.route_options is not None:
            weights, experts = self._chosen(kernels, held, tokens, x, request)
        part = torch.zeros(len(tokens), base.shape[-1], dtype=base.dtype, device=base.device)
        applied = {"lora_bias": held["lora_bias"], "factored": self.factored}
        kernels.lora_apply_(part, tokens, held["lora_A"], held["lora_B"], weights, experts, **applied)
        return base + self._reduce(part).view(base.shape)

    def _chosen(
        self, kernels: Any, held: Mapping[str, Tensor | None], tokens: Tensor, x: Tensor, request: Request
    ) -> tuple[Tensor, Tensor]:
        self._gate_sums = self._gate_sums.to(x.device)
        gates = held["gates"].double().t()
        scores = partial_scores(tokens, gates, self._gate_sums, self.in_features, self.route_options, self._reduce)
        bias = self.score_bias(x.device, request)
        if bias is not None:
            rows = self.rows_of(x, request)
            if rows is None:
                rows = torch.arange(len(tokens), device=x.device) * len(bias) // max(1, len(tokens))
            scores = scores + bias[rows.long()]
        weights, experts = chosen(kernels, scores, self.route_options, held["mask"])
        if request.trace is not None:
            real = None if request.tokens is None else request.tokens.mask(x)
            request.trace.add(self.name, weights, experts, real, x)
        return weights, experts


def layers_at(model: nn.Module, plans: Mapping[str, Plan]) -> dict[str, Callable[..., RoutedLinear]]:
    """{path: what makes the routed layer for the layer there: of the plan, the routing and options of RoutedLinear}."""
    parallel, found = is_parallel(model), {}
    for path, plan in plans.items():
        layer, place = model.get_submodule(path), place_of(model, path) if parallel else None
        if place is None:
            found[path] = partial(AT_PRODUCTS[layer_of(plan)] if is_product(layer) else layer_of(plan), layer)
        else:
            kind = SharedLinear if place.share.columns is None else PartialLinear
            found[path] = partial(kind, layer, place=place)
    return found


def plan_problems(model: nn.Module, plans: Mapping[str, Plan], spare: int) -> list[str]:
    """Why the experts of layers that are shared out over ranks cannot be, nor those of products within a module."""
    alone = [path for path, plan in plans.items() if layer_of(plan) not in AT_PRODUCTS]
    problems = [
        f"module '{path}': in a {type(layer).__name__} only LoRA experts are routed"
        for path in alone
        if is_product(layer := model.get_submodule(path))
    ]
    if not is_parallel(model):
        return problems
    problems += [] if not spare else [f"spare={spare}: a tensor parallel model has no spare slots"]
    for path, plan in plans.items():
        if place_of(model, path) is not None and layer_of(plan) is not RoutedLinear:
            problems.append(
                f"module '{path}': on a tensor parallel model only LoRA experts are routed, by gates or fixed weights"
            )
    return problems


def agreed(model: nn.Module, problems: list[str], asked: tuple[str, Mapping[str, Any], ExpertBank]) -> list[str]:
    """The problems of any rank of a tensor parallel model, the same on all; or that ranks were asked for different
    things. asked: (method, options, experts)
    """
    group = mesh_group(model) if is_parallel(model) else None
    if group is None:
        return problems
    said: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(said, (problems, _digest(*asked)), group=group)
    if found := list(dict.fromkeys(problem for theirs, _ in said for problem in theirs)):
        return found
    differing = len({digest for _, digest in said}) > 1
    return ["the ranks were given different experts, methods or options: call it alike on all"] if differing else []


def _digest(method: str, options: Mapping[str, Any], experts: ExpertBank) -> str:
    """Equal for equal experts, whatever folders they came from."""
    plain = {name: value for name, value in options.items() if value is None or isinstance(value, str | int | float)}
    sums = [(path, _bits(bank.lora_A), _bits(bank.lora_B)) for path, bank in experts.modules.items()]
    return hashlib.sha256(repr((method, sorted(plain.items()), experts.names, sums)).encode()).hexdigest()


def _bits(tensor: Tensor) -> tuple[tuple[int, ...], int]:
    """A tensor's shape and the sum of its bits, the same in any order."""
    words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
    return tuple(tensor.shape), int(words.sum(dtype=torch.int64))


def _refuse_gradients(layer: RoutedLinear, x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(NO_GRADIENTS.format(layer.name))
