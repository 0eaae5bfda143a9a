"""RoutedBranches: a linear layer among whose experts are some that are no LoRA.

    y = base(u) + sum_e w_e (expert_e(u) - base(u))              e over the selected, whatever each of them is

so that experts of different kinds share one softmax (PHATGOOSE, arXiv 2402.05859, section 3, for "any PEFT module");
where the weights sum to 1 that is the weighted mean of what the experts would compute alone. For (IA)3:

    on the output    expert_e(u) - base(u) = (l_e - 1) * (W u + b)
    on the input     expert_e(u) - base(u) = W ((l_e - 1) * u)

For bottleneck adapters expert_e(u) - base(u) = up_e f(down_e z), see `bottleneck.py`. The vectors of (IA)3 are
added up before they meet the layer: one call of the base layer, or two where its input is scaled and its output used.
The router sees u, as the layer gets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..experts.branches import AFTER, kind_name
from ..experts.formats.adapter import SCALE_IN, SCALE_OUT
from ..experts.module_bank import ModuleBank
from ..methods.base import Method, Plan, Routing
from .bottleneck import Residual, bottleneck, residual_problems, unwatch, watch_residual
from .by_request import ByRequest
from .layers import execution_device
from .routed_linear import BACKENDS, RoutedLinear
from .state import Request


def against_branches(method: Method, model: nn.Module, modules: Mapping[str, ModuleBank]) -> list[str]:
    """Why the method, or the model, cannot have the experts that are no LoRA, for each module that has some."""
    if not method.lora_only:
        after = [path for path, module in modules.items() if any(kind.endswith(AFTER) for kind in module.branches)]
        return residual_problems(model, after)
    return [left_out(method, path, module) for path, module in modules.items() if module.branches]


def left_out(method: Method, path: str, module: ModuleBank) -> str:
    """What to say where the method's plan of a module leaves out the experts that are no LoRA."""
    kinds = ", ".join(dict.fromkeys(kind_name(kind) for kind in module.branches))
    return (
        f"module '{path}': {kinds} experts among them, and method '{method.name}' is computed from the factors of "
        "LoRA: take one with gates or given weights, such as phatgoose, average_activation, retrieval or given"
    )


class RoutedBranches(ByRequest, RoutedLinear):
    """A RoutedLinear whose plan has `branches`. Their tensors are buffers, the vectors of (IA)3 as l - 1 in float32."""

    why_apart = "some of its experts are no LoRA"

    def __init__(self, base_layer: nn.Module, plan: Plan, routing: Routing | None, **options: Any):
        super().__init__(base_layer, plan, routing, **options)
        device = execution_device(base_layer)
        self.kinds = tuple(plan.branches)
        self._float32, self.users = RoutedLinear._float32, {}
        for kind, branch in plan.branches.items():
            self.users[kind] = branch.present.nonzero().flatten().tolist()
            for part, tensor in branch.tensors.items():
                name = f"branch_{kind}_{part}"
                value = tensor.to(device) - 1 if part == "scale" else tensor.to(device)
                self.register_buffer(name, value, persistent=False)
                self._float32 = (*self._float32, name)
        self.residual: Residual | None = None

    def take_place(self, model: nn.Module, path: str) -> None:
        super().take_place(model, path)
        if any(kind.endswith(AFTER) for kind in self.kinds):
            self.residual = watch_residual(model, path)

    def give_back(self, model: nn.Module, path: str) -> None:
        super().give_back(model, path)
        if self.residual is not None:
            unwatch(model)

    def _with_request(self, x: Tensor, request: Request, *args: Any, **kwargs: Any) -> Tensor:
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
        if set(self.kinds) - {SCALE_IN}:
            plain = y if scaled is x else self.base_layer(x, *args, **kwargs)
            total = self._with_outputs(total, plain, weights, experts)
        if self.lora_A.shape[1]:
            options = {"lora_bias": self.lora_bias, "factored": self.factored}
            apply = BACKENDS[self.backend].lora_apply
            total = apply(total, tokens, self.lora_A, self.lora_B, weights, experts, **options)
        return total.to(y.dtype).view(y.shape)

    def _with_outputs(self, total: Tensor, plain: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """total [T,O] with what the experts make of the base layer's output `plain` [..., O]."""
        flat = plain.reshape(-1, self.out_features).to(total.dtype)
        after = None if self.residual is None else self.residual.added_to(plain).reshape(flat.shape).to(total.dtype)
        for kind in self.kinds:
            if kind == SCALE_OUT:
                total = total + flat * self._scale(kind, weights, experts).to(total.dtype)
            elif kind != SCALE_IN:
                z = after if kind.endswith(AFTER) else flat
                total = total + self._bottlenecks(kind, z, weights.to(total.dtype), experts)
        return total

    def _bottlenecks(self, kind: str, z: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """sum_k w_tk up_k f(down_k z_t), expert by expert over the tokens that have chosen it."""
        activation, total = kind.split("/")[1], torch.zeros_like(z)
        stacks = {part: getattr(self, f"branch_{kind}_{part}") for part in ("down", "down_bias", "up", "up_bias")}
        with torch.autocast(z.device.type, enabled=False):
            for e in self.users[kind]:
                share = torch.where(experts == e, weights, 0).sum(1)
                rows = share.nonzero().flatten()
                own = {part: stack[e].to(z.dtype) for part, stack in stacks.items()}
                total = total.index_add(0, rows, share[rows, None] * bottleneck(z[rows], own, activation))
        return total

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
        vectors = getattr(self, f"branch_{kind}_scale").to(weights.dtype)
        return functional.embedding_bag(experts.long(), vectors, mode="sum", per_sample_weights=weights)


def _times(x: Tensor, change: Tensor) -> Tensor:
    """x * (1 + change), rounded once to x's dtype."""
    return (x.to(change.dtype) * (1 + change.view(x.shape))).to(x.dtype)
