"""RoutedBranches: a linear layer among whose experts are some that are no LoRA.

    y = base(u) + sum_e w_e (expert_e(u) - base(u))              e over the selected, whatever each of them is

so that experts of different kinds share one softmax (PHATGOOSE, arXiv 2402.05859, section 3, for "any PEFT module");
where the weights sum to 1 that is the weighted mean of what the experts would compute alone. For (IA)3:

    on the output    expert_e(u) - base(u) = (l_e - 1) * (W u + b)
    on the input     expert_e(u) - base(u) = W ((l_e - 1) * u)

The vectors are added up before they meet the layer: one call of the base layer, or two where both sides are scaled.
The router sees u, as the layer gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..experts.branches import KIND_NAMES
from ..experts.formats.adapter import SCALE_IN, SCALE_OUT
from ..experts.module_bank import ModuleBank
from ..methods.base import Method, Plan, Routing
from .layers import execution_device
from .routed_linear import BACKENDS, RoutedLinear
from .state import IDLE, Request
from .threads import REQUESTS


def routed_layer(base_layer: nn.Module, plan: Plan, routing: Routing | None, **shared: Any) -> RoutedLinear:
    """The layer that computes what `plan` says."""
    kind = RoutedBranches if plan.branches or not plan.lora_A.shape[1] else RoutedLinear
    return kind(base_layer, plan, routing, **shared)


def against_branches(method: Method, modules: Mapping[str, ModuleBank]) -> list[str]:
    """Why the method cannot have the experts that are no LoRA, for each module that has some."""
    if not method.lora_only:
        return []
    return [left_out(method, path, module) for path, module in modules.items() if module.branches]


def left_out(method: Method, path: str, module: ModuleBank) -> str:
    """What to say where the method's plan of a module leaves out the experts that are no LoRA."""
    kinds = ", ".join(dict.fromkeys(KIND_NAMES[kind] for kind in module.branches))
    return (
        f"module '{path}': {kinds} experts among them, and method '{method.name}' is computed from the factors of "
        "LoRA: take one with gates or given weights, such as phatgoose, average_activation, retrieval or given"
    )


class RoutedBranches(RoutedLinear):
    """A RoutedLinear whose plan has `branches`. Their tensors are buffers, the vectors of (IA)3 as l - 1 in float32."""

    why_apart = "some of its experts are no LoRA"

    def __init__(self, base_layer: nn.Module, plan: Plan, routing: Routing | None, **options: Any):
        super().__init__(base_layer, plan, routing, **options)
        device = execution_device(base_layer)
        self.kinds = tuple(plan.branches)
        for kind, branch in plan.branches.items():
            self.register_buffer(f"branch_{kind}", branch.tensors["scale"].to(device) - 1, persistent=False)
        self._float32 = (*RoutedLinear._float32, *(f"branch_{kind}" for kind in self.kinds))

    def _eager_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self.state.current() if REQUESTS.get() or self.state.busy else IDLE
        return self._with_branches(x, request, *args, **kwargs)

    def _compiled_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        request = self.state.shown()
        if request is None:
            return self._outside_of_graphs(x, *args, **kwargs)
        return self._with_branches(x, request, *args, **kwargs)

    def _with_branches(self, x: Tensor, request: Request, *args: Any, **kwargs: Any) -> Tensor:
        if not request.enabled:
            return self.base_layer(x, *args, **kwargs)
        tokens = x.reshape(-1, self.in_features)
        weights, experts = self._slots(tokens, x, request)
        scaled = x
        if SCALE_IN in self.kinds:
            scaled = _times(x, self._scale(SCALE_IN, weights, experts))
        y = self.base_layer(scaled, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"{self.name}: {type(self.base_layer).__name__} returned a {type(y).__name__}, not a tensor"
            )
        wide = torch.promote_types(y.dtype, torch.float32)
        total = y.reshape(-1, self.out_features).to(wide)
        if SCALE_OUT in self.kinds:
            plain = total if scaled is x else self.base_layer(x, *args, **kwargs).reshape(-1, self.out_features)
            total = total + plain.to(wide) * self._scale(SCALE_OUT, weights, experts).to(wide)
        if self.lora_A.shape[1]:
            options = {"lora_bias": self.lora_bias, "factored": self.factored}
            apply = BACKENDS[self.backend].lora_apply
            total = apply(total, tokens, self.lora_A, self.lora_B, weights, experts, **options)
        return total.to(y.dtype).view(y.shape)

    def _slots(self, tokens: Tensor, x: Tensor, request: Request) -> tuple[Tensor, Tensor]:
        """(weights [T,K], experts [T,K]) of the tokens."""
        if self.route_options is None:
            rows = (len(tokens), -1)
            return self.weights.expand(rows).contiguous(), self.experts.expand(rows).contiguous()
        weights, experts = BACKENDS[self.backend].route(
            tokens,
            self.gates,
            bias=self.score_bias(x.device, request),
            rows=self.rows_of(x, request),
            mask=self.mask,
            **self.route_options,
        )
        if request.trace is not None:
            real = None if request.tokens is None else request.tokens.mask(x)
            request.trace.add(self.name, weights, experts, real)
        return weights, experts

    def _scale(self, kind: str, weights: Tensor, experts: Tensor) -> Tensor:
        """sum_k w_tk (l_k - 1), [T,D] or [T,O]."""
        vectors = getattr(self, f"branch_{kind}").to(weights.dtype)
        return functional.embedding_bag(experts.long(), vectors, mode="sum", per_sample_weights=weights)


def _times(x: Tensor, change: Tensor) -> Tensor:
    """x * (1 + change), rounded once to x's dtype."""
    return (x.to(change.dtype) * (1 + change.view(x.shape))).to(x.dtype)
