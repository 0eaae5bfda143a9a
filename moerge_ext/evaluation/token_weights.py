"""The weights that routed layers apply to the tokens of one sequence, kept in the order of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..routing.routed_experts import ParameterBranch
from ..routing.routed_linear import BACKENDS, RoutedLinear
from .places import place_of


class Applied:
    """What `layers` {path: layer} applied while `on`: of each a list of calls, weights and experts [t,K]."""

    def __init__(self, layers: Mapping[str, RoutedLinear | ParameterBranch]):
        self.layers, self.on = dict(layers), True
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.out_of_order: set[str] = set()

    def rows(self, path: str) -> tuple[int, int] | None:
        """(tokens of the first call, of all calls); None for a layer that did not run or sees tokens in no order."""
        calls = self.calls.get(path)
        if not calls or path in self.out_of_order:
            return None
        return len(calls[0][0]), sum(len(weights) for weights, _ in calls)

    def dense(self, path: str, count: int) -> Tensor:
        """[T,E] float32."""
        weights, experts = (torch.cat(parts) for parts in zip(*self.calls[path], strict=True))
        return torch.zeros(len(weights), count, dtype=torch.float32, device="cpu").scatter_add(1, experts, weights)


@contextmanager
def applied_weights(layers: Mapping[str, RoutedLinear | ParameterBranch]) -> Iterator[Applied]:
    """Keeps what the layers apply in the forwards of one sequence inside the block.

    The layers compute what they compute without it; each scores its tokens once more.
    """
    applied = Applied(layers)

    def before(layer: RoutedLinear | ParameterBranch, args: tuple) -> None:
        if not applied.on or not layer.state.current().enabled:
            return
        found = _of_parameter(layer, *args[1:]) if isinstance(layer, ParameterBranch) else _of_linear(layer, args)
        if found is None:
            applied.out_of_order.add(layer.name)
        else:
            weights, experts = (part.detach().cpu() for part in found)
            applied.calls.setdefault(layer.name, []).append((weights.float(), experts.long()))

    hooks = [layer.register_forward_pre_hook(before) for layer in layers.values()]
    try:
        yield applied
    finally:
        for hook in hooks:
            hook.remove()


def _of_linear(layer: RoutedLinear, args: tuple) -> tuple[Tensor, Tensor] | None:
    """weights and experts [t,K]; None where the input is not one sequence of tokens in order."""
    x: Any = args[0] if args else None
    # in a list inside of the list of layers it may be one of the base's experts, which get a choice of tokens
    listed_twice = "*" in place_of(layer.name).kind.split(".")
    if x is None or (x.dim() == 2 and listed_twice) or (x.dim() > 2 and x.shape[0] != 1):
        return None
    options = layer.route_options | {"bias": layer.score_bias(x.device), "rows": layer.rows_of(x), "mask": layer.mask}
    return BACKENDS[layer.backend].route(x.reshape(-1, layer.in_features), layer.gates, **options)


def _of_parameter(branch: ParameterBranch, x: Tensor, pairs: Any, copies: bool) -> tuple[Tensor, Tensor]:
    """The same for a stacked parameter of experts; where it scores pairs of token and base expert, the token's mean."""
    weights, experts = branch.scored(BACKENDS[branch.backend], x, pairs, copies, branch.route_options)
    if copies and branch.gates.dim() == 2:
        return weights, experts
    total = torch.zeros(len(pairs.tokens), branch.num_experts, dtype=weights.dtype, device=weights.device)
    total.index_put_((pairs.token.long()[:, None].expand_as(experts), experts.long()), weights, accumulate=True)
    counts = torch.bincount(pairs.token.long(), minlength=len(total)).clamp_min(1)
    everyone = torch.arange(branch.num_experts, device=experts.device).expand(len(total), -1)
    return total / counts[:, None], everyone
