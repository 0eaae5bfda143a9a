"""The data of a cell: weights (several copies of one module), tokens, and what the reference makes of them."""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moerge_ext
from moerge_ext import ExpertBank, ModuleBank, reference
from moerge_ext.methods.base import standardize
from moerge_ext.methods.prototypes import power_iteration_prototypes

from .cells import Cell
from .machine import last_level_cache
from .timing import Settings

CHECKED_TOKENS = 256  # the reference is slow; these tokens, spread over the batch, stand for all
SIGNAL = 8.0  # score of a token's intended experts, in standard deviations of the other experts' scores


def popularity(kind: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """[T,K] int64 distinct experts per token.

    "uniform"; "zipf": successive draws without replacement with P(e) ~ 1 / (e + 1); "all-same": experts 0 .. K-1.
    """
    if kind == "all-same":
        return torch.arange(top_k).expand(tokens, top_k).clone()
    if kind == "uniform":
        log_p = torch.zeros(experts)
    elif kind == "zipf":
        log_p = -torch.arange(1, experts + 1, dtype=torch.float32).log()
    else:
        raise ValueError(f"popularity must be 'uniform', 'zipf' or 'all-same', got {kind!r}")
    # the K largest of log p + Gumbel noise are such draws
    uniform = torch.rand(tokens, experts, generator=generator).clamp(1e-30, 1 - 1e-7)
    return (log_p - (-uniform.log()).log()).topk(top_k, dim=1).indices


def copies_needed(cell: Cell, device: torch.device, settings: Settings) -> int:
    """Copies of the module such that going round them reads twice the last-level cache before a copy comes again."""
    if not settings.cold:
        return 1
    layer = cell.D * cell.O * cell.torch_dtype.itemsize
    return max(2, min(settings.max_copies, math.ceil(2 * last_level_cache(device) / layer)))


def weights_bytes(cell: Cell, copies: int) -> int:
    """Bytes of all copies: the layer, the experts, our layout of A, and the second layout of B."""
    per_expert = cell.R * (2 * cell.D + 2 * cell.O)
    return copies * ((cell.D * cell.O + cell.E * per_expert) * cell.torch_dtype.itemsize + 8 * cell.E * cell.D)


class _Holder(nn.Module):
    """One module whose children proj.0, proj.1, ... are the copies."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.proj = nn.ModuleList(bare_linear(w) for w in weights)


def bare_linear(weight: Tensor) -> nn.Linear:
    """nn.Linear around an existing weight [O,D], no bias."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.eval()


class Weights:
    """Copies of one linear layer and of its experts: equal values in separate memory.

    W [O,D] per copy; A [E,R,D] and Bt [E,R,O] contiguous, the best for the peers' GEMMs (our bank shares Bt and has
    its own layout of A);
    gates [E,D] float32 as the router uses them; fast_gates [E,D]: 1/sqrt(D) folded in, in the dtype of x.
    """

    def __init__(self, cell: Cell, device: torch.device, settings: Settings):
        self.cell, self.device = cell, device
        self.copies = copies_needed(cell, device, settings)
        make = torch.Generator(device).manual_seed(1)
        dtype = cell.torch_dtype

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.randn(*shape, generator=make, device=device).mul_(scale).to(dtype)

        weight = normal(cell.O, cell.D, scale=cell.D**-0.5)
        a = normal(cell.E, cell.R, cell.D, scale=cell.D**-0.5)
        bt = normal(cell.E, cell.R, cell.O, scale=cell.R**-0.5)
        # the experts' own directions: PHATGOOSE (as gates) and Arrow (as prototypes) then choose alike
        self.directions, _ = power_iteration_prototypes(a, bt.transpose(1, 2))
        gates = standardize(self.directions)
        rest = range(self.copies - 1)
        self.W = [weight, *(weight.clone() for _ in rest)]
        self.A = [a, *(a.clone() for _ in rest)]
        self.Bt = [bt, *(bt.clone() for _ in rest)]
        self.gates = [gates, *(gates.clone() for _ in rest)]
        self.fast_gates = [(g * cell.D**-0.5).to(dtype) for g in self.gates]

    @cached_property
    def B(self) -> list[Tensor]:
        """Bt once more as [E,O,R] contiguous, per copy: the layout of PEFT and of the Triton kernels."""
        return [bt.transpose(1, 2).contiguous() for bt in self.Bt]

    def holder(self) -> _Holder:
        return _Holder(self.W)

    def _patched(self, method: str, **options) -> list[nn.Module]:
        names = [f"e{i}" for i in range(self.cell.E)]
        modules = {
            f"proj.{i}": ModuleBank(
                self.A[i], self.Bt[i].transpose(1, 2), gates={"sigmoid-gate": self.directions.clone()}
            )
            for i in range(self.copies)
        }
        model = self.holder()
        moerge_ext.patch(model, ExpertBank(names, modules), method, top_k=self.cell.K, **options)
        return list(model.proj)

    @cached_property
    def phatgoose_layers(self) -> list[nn.Module]:
        """Our patched layer, one per copy."""
        return self._patched("phatgoose")

    @cached_property
    def arrow_layers(self) -> list[nn.Module]:
        """The same under the row that reproduces PEFT's Arrow."""
        return self._patched("arrow_peft", seed=0)


class Tokens:
    """x [T,D] that the router sends to the experts the popularity asks for, the routing, and the reference results.

    weights [T,K] float32, experts [T,K] int32 (`experts64`: int64, as torch's own ops want them; `dense` [T,E]).
    checked [C]: the tokens that are compared; base [C,O] is the plain result, float32.
    """

    def __init__(self, cell: Cell, weights: Weights):
        self.cell = cell
        make = torch.Generator().manual_seed(2)
        chosen = popularity(cell.popularity, cell.T, cell.E, cell.K, make)
        strength = SIGNAL * (1 + 0.2 * torch.rand(cell.T, cell.K, generator=make))
        noise = torch.randn(cell.T, cell.D, generator=make)
        signal = torch.einsum("tk,tkd->td", strength, weights.directions.cpu()[chosen])
        dtype, device = cell.torch_dtype, weights.device
        self.x = (noise + signal).to(device, dtype)
        self.weights, self.experts = reference.route(self.x, weights.gates[0], top_k=cell.K)
        self.experts64 = self.experts.long()
        self.experts_used = len(self.experts.unique())
        self.checked = torch.linspace(0, cell.T - 1, min(cell.T, CHECKED_TOKENS), device=device).round().long()
        self._bank = (weights.A[0], weights.Bt[0].transpose(1, 2))
        self.base = F.linear(self.x[self.checked].float(), weights.W[0].float())
        self._prototypes, self._truths = weights.directions, {}
        self.plain = F.linear(self.x, weights.W[0])

    def truth(self, kind: str) -> Tensor:
        """Expected y [C,O] of the checked tokens, by what a candidate does; "arrow" is PEFT's definition."""
        if kind not in self._truths:
            self._truths[kind] = self._expected(kind)
        return self._truths[kind]

    def _expected(self, kind: str) -> Tensor:
        x, (a, b) = self.x[self.checked], self._bank
        if kind == "plain":
            return self.base
        if kind == "expert 0":
            weights = torch.ones(len(x), 1, device=x.device)
            return reference.lora_apply(self.base, x, a[:1], b[:1], weights, weights.int() - 1)
        if kind == "arrow":
            prototypes = self._prototypes.to(self.x.dtype).float()
            routing = reference.route(x, prototypes, top_k=self.cell.K, normalize="none", absolute=True)
        else:
            routing = (self.weights[self.checked], self.experts[self.checked])
        return reference.lora_apply(self.base, x, a, b, *routing)

    @cached_property
    def branch(self) -> Tensor:
        """[C,O]: what the experts add; errors are measured against its size."""
        return self.truth("phatgoose") - self.base
