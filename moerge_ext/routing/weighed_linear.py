"""WeighedLinear: a linear layer whose experts are weighed by a router that no option of the ops expresses.

Torch computes the weights [T,E] (`methods.weighing`), `lora_apply` the experts:

    y = base_layer(x) + sum_e w_e B_e A_e x
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Plan, Routing
from .layers import execution_device
from .routed_branches import RoutedBranches
from .routed_linear import BACKENDS, RoutedLinear
from .state import Request
from .ways import against_in_place


class WeighedLinear(RoutedLinear):
    """A linear layer, its experts, and the `Weigher` that weighs them (several layers may share one)."""

    unrouted = "its weights come from a router that is no option of the op: torch computes them"

    def __init__(self, base_layer: nn.Module, plan: Plan, routing: Routing | None, **options: Any):
        super().__init__(base_layer, plan, routing, **options)
        ids = torch.arange(plan.lora_A.shape[0], dtype=torch.int32, device=self.lora_A.device)
        self.experts = ids[None]
        self.weigher = plan.weigher.to(execution_device(base_layer))

    def _add_branch(self, base: Tensor, x: Tensor, request: Request) -> Tensor:
        if not request.enabled:
            return base
        self._check_result(base)
        self.weigher.check_input(x, self.name)
        kernels, held, tokens = BACKENDS[self.backend], self._held(), x.reshape(-1, self.in_features)
        with torch.autocast(x.device.type, enabled=False):
            weights = self.weigher(tokens, self, self._row_bias(x, request))
            experts = held["experts"].expand(len(weights), -1)
            slots = (held["lora_A"], held["lora_B"], weights, experts.contiguous())
            applied = {"lora_bias": held["lora_bias"], "factored": self.factored}
            if request.trace is not None:
                real = None if request.tokens is None else request.tokens.mask(x)
                request.trace.add(self.name, weights, slots[3], real, x)
            y = base.reshape(-1, self.out_features)
            if self.weigher.finishes:
                branch = kernels.lora_apply(torch.zeros_like(y), tokens, *slots, **applied)
                return (y + self.weigher.finish(branch, tokens).to(y.dtype)).view(base.shape)
            if base.is_contiguous() and not against_in_place(self, request):
                kernels.lora_apply_(y, tokens, *slots, **applied)
                return base
            return kernels.lora_apply(y, tokens, *slots, **applied).view(base.shape)

    def _row_bias(self, x: Tensor, request: Request) -> Tensor | None:
        """[T,E]: what the handle adds to the scores of every token's row."""
        bias = self.score_bias(x.device, request)
        if bias is None:
            return None
        tokens = x.numel() // self.in_features
        rows = self.rows_of(x, request)
        if rows is None:
            rows = torch.arange(tokens, device=x.device) * len(bias) // max(1, tokens)
        return bias[rows.long()]

    def extra_repr(self) -> str:
        n_experts, rank, _ = self.lora_A.shape
        return f"experts={n_experts}, rank={rank}, factored={self.factored}"


def layer_of(plan: Plan) -> type[RoutedLinear]:
    """The class of layer that a plan needs."""
    if plan.weigher is not None:
        return WeighedLinear
    return RoutedBranches if plan.branches or not plan.lora_A.shape[1] else RoutedLinear


def watch_blocks(model: nn.Module, layers: Iterable[RoutedLinear]) -> None:
    """Lets the routers of blocks read their blocks' inputs; `drop_hooks` with `Weigher` ends it."""
    weighers = {id(layer.weigher): layer.weigher for layer in layers if isinstance(layer, WeighedLinear)}
    for weigher in weighers.values():
        if weigher.reads is not None:
            block = model.get_submodule(weigher.reads)
            block.register_forward_pre_hook(weigher.read, with_kwargs=True)
            block.register_forward_hook(weigher.forget, always_call=True)
