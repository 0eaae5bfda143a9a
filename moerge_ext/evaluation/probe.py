"""The whole routing distribution of every token, beside the forward pass: what top-k hides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..routing.fused_experts import Pairs
from ..routing.routed_experts import ParameterBranch
from ..routing.routed_linear import BACKENDS, RoutedLinear

TINY = torch.finfo(torch.float32).tiny  # a probability of 0 has a finite logarithm: about -87


@dataclass
class ModuleSums:
    """Sums over the tokens that passed one module, float64.

    distribution [E]: p_t, softmax over all experts of the routing scores (for a method whose scores are weights: the
    weights, normalized); weight [E]: the weights applied after top-k or top-p; log [E]: log p_t; entropy: of p_t, nats.
    """

    distribution: Tensor
    weight: Tensor
    log: Tensor
    entropy: float = 0.0
    tokens: int = 0

    def token_divergence(self, oracle: int) -> float:
        """KL(oracle || p_t) in nats, the mean over tokens: -log p_t[oracle], as the oracle always picks one."""
        return -self.log[oracle].item() / self.tokens


@contextmanager
def probe(model: nn.Module) -> Iterator[dict[str, ModuleSums]]:
    """Collects {module: ModuleSums} from every routed layer of a patched model; padding tokens count, so give none.

    The layers compute what they compute without it. ValueError when nothing is routed.
    """
    kinds = (RoutedLinear, ParameterBranch)
    layers = {m.name: m for m in model.modules() if isinstance(m, kinds) and m.route_options is not None}
    if not layers:
        raise ValueError(
            "this model routes nothing by the ops: patch it with a method that does (not merged, not one expert, not a "
            "router whose weights torch computes, of which handle.record() shows the sums)"
        )
    sums: dict[str, ModuleSums] = {}

    def before(layer: RoutedLinear | ParameterBranch, args: tuple) -> None:
        if not layer.state.current().enabled:
            return
        if isinstance(layer, ParameterBranch):
            applied, p = distributions_of_parameter(layer, *args[1:])
        else:
            tokens = args[0].detach().reshape(-1, layer.in_features)
            applied, p = distributions(layer, tokens, layer.rows_of(args[0]))
        if layer.name not in sums:
            sums[layer.name] = ModuleSums(
                *(torch.zeros(p.shape[1], dtype=torch.float64, device="cpu") for _ in range(3))
            )
        mine = sums[layer.name]
        log = p.clamp_min(TINY).log()
        mine.distribution += p.sum(0)
        mine.weight += applied.sum(0)
        mine.log += log.sum(0)
        mine.entropy -= (p * log).sum().item()
        mine.tokens += p.shape[0]

    hooks = [layer.register_forward_pre_hook(before) for layer in layers.values()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def distributions(layer: RoutedLinear, tokens: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """tokens [T,D] -> (weights applied [T,E], distribution over all experts [T,E]), float64 on the CPU."""
    count = layer.num_experts
    route, options = BACKENDS[layer.backend].route, layer.route_options
    common = {"bias": layer.score_bias(tokens.device), "rows": rows, "mask": layer.mask}
    return _applied_and_all(lambda asked: route(tokens, layer.gates, **asked, **common), options, count)


@torch.no_grad()
def distributions_of_parameter(branch: ParameterBranch, x: Tensor, pairs: Pairs, copies: bool) -> tuple[Tensor, Tensor]:
    """As `distributions`, of the tokens or (token, base expert) pairs that a stacked parameter of experts scores."""
    kernels = BACKENDS[branch.backend]
    ask = lambda asked: branch.scored(kernels, x, pairs, copies, asked)  # noqa: E731
    return _applied_and_all(ask, branch.route_options, branch.num_experts)


def _applied_and_all(
    route: Callable[[dict], tuple[Tensor, Tensor]], options: dict, count: int
) -> tuple[Tensor, Tensor]:
    applied = _dense(*route(options), count)
    if options["weighting"] == "score":
        size = applied.abs()
        return applied, size / size.sum(1, keepdim=True).clamp_min(1e-30)
    return applied, _dense(*route({**options, "top_k": count, "top_p": None, "weighting": "softmax_all"}), count)


def _dense(weights: Tensor, experts: Tensor, count: int) -> Tensor:
    zeros = torch.zeros(weights.shape[0], count, dtype=torch.float64, device="cpu")
    return zeros.scatter_add(1, experts.long().cpu(), weights.double().cpu())
