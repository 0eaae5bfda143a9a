"""One patched linear, and every way a user could do the same today. Each is written as its best user would.

A peer's apply(base, x, i, weights [T,K], experts [T,K] int64) adds the experts of copy i to base [T,O], in place where
that is the fastest. Routed, it first runs `fast_route`. A [E,R,D] and Bt [E,R,O] are contiguous: no peer
copies a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moerge_ext import ops, reference

from .cells import Cell, wants
from .data import Tokens, Weights
from .fast_route import fast_route
from .timing import PLAIN, PLAIN_AGAIN, Candidate

Apply = Callable[[Tensor, Tensor, int, Tensor, Tensor], Tensor]


class Peers:
    """The peers' functions over one set of weights."""

    def __init__(self, weights: Weights):
        self.weights, self.A, self.Bt = weights, weights.A, weights.Bt
        self.E, self.R = weights.cell.E, weights.cell.R
        self._gathered: dict[str, Tensor] = {}

    def gather_bmm(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """Gather each token's A and B, two batched products."""
        tokens, k = experts.shape
        flat = experts.flatten()
        for name, source in (("a", self.A[i]), ("bt", self.Bt[i])):
            if name not in self._gathered:  # reused: fresh pages for so much memory cost more than the products
                self._gathered[name] = source.new_empty(len(flat), *source.shape[1:])
            torch.index_select(source, 0, flat, out=self._gathered[name])
        a, bt = (self._gathered[name].view(tokens, k * self.R, -1) for name in ("a", "bt"))
        h = torch.bmm(a, x[:, :, None]).view(tokens, k, self.R)
        h.mul_(w[:, :, None])
        return base[:, None].baddbmm_(h.view(tokens, 1, k * self.R), bt)[:, 0]

    def dense(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """All experts for all tokens as two GEMMs, weights (0 for the others) in between."""
        mask = x.new_zeros(len(x), self.E).scatter_(1, experts, w.to(x.dtype))
        h = (x @ self.A[i].view(self.E * self.R, -1).T).view(-1, self.E, self.R)
        h.mul_(mask[:, :, None])
        return base.addmm_(h.view(-1, self.E * self.R), self.Bt[i].view(self.E * self.R, -1))

    def sort_loop(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """Sort the (token, expert) pairs, two small GEMMs per expert that is used, one weighted gather at the end."""
        a, bt = self.A[i], self.Bt[i]
        if len(x) == 1:  # nothing to sort
            for e, weight in zip(experts[0].tolist(), w[0].tolist(), strict=True):
                base.addmm_(x @ a[e].T, bt[e], alpha=weight)
            return base
        order, inverse, token = _sorted_pairs(experts)
        rows = x.index_select(0, token)
        out = base.new_empty(len(order), base.shape[1])
        start = 0
        for e, count in enumerate(torch.bincount(experts.flatten(), minlength=self.E).tolist()):
            if count:
                stop = start + count
                torch.mm(rows[start:stop] @ a[e].T, bt[e], out=out[start:stop])
                start = stop
        return base.add_(F.embedding_bag(inverse, out, mode="sum", per_sample_weights=w.to(out.dtype)))

    def grouped_mm(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """The same with torch's grouped GEMM in place of the loop."""
        _, inverse, token = _sorted_pairs(experts)
        counts = torch.bincount(experts.flatten(), minlength=self.E)
        ends = counts.cumsum(0, dtype=torch.int32)
        h = F.grouped_mm(x.index_select(0, token), self.A[i].transpose(1, 2), offs=ends)
        out = F.grouped_mm(h, self.Bt[i], offs=ends)
        return base.add_(F.embedding_bag(inverse, out, mode="sum", per_sample_weights=w.to(out.dtype)))

    def torch_reference(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """Plain torch as in our own reference: written to be read."""
        return reference.lora_apply(base, x, self.A[i], self.Bt[i].transpose(1, 2), w, experts)

    def ours(self, base: Tensor, x: Tensor, i: int, w: Tensor, experts: Tensor) -> Tensor:
        """Our op on our bank."""
        bank = self.weights.phatgoose_layers[i]
        ops.lora_apply_(base, x, bank.lora_A, bank.lora_B, w, experts)
        return base


def _sorted_pairs(experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (token, slot) by expert: their order, where each pair went [T,K], and the token of each sorted pair."""
    order = experts.flatten().argsort()
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return order, inverse.view(experts.shape), order // experts.shape[1]


def transient_bytes(cell: Cell) -> dict[str, float]:
    """Bytes each candidate allocates at its peak beyond inputs and output, where that can be large."""
    size = cell.torch_dtype.itemsize
    return {
        "gather_bmm": cell.T * cell.K * cell.R * (cell.D + cell.O) * size,
        "dense": 2 * cell.T * cell.E * cell.R * size,
        "torch_reference": cell.T * (cell.E * (cell.R + 1) + 5 * cell.O) * 4.0,
        "peft_arrow": (2 * cell.T * cell.E * cell.O + cell.E * cell.R * (cell.D + cell.O)) * size,
        "sort_loop": cell.T * cell.K * (cell.D + cell.O) * size,
        "grouped_mm": cell.T * cell.K * (cell.D + cell.O) * size,
    }


def traffic_bytes(cell: Cell) -> dict[str, float]:
    """Bytes of those two that go through memory once per expert: enough to know a hopeless call beforehand."""
    return {
        "torch_reference": 8.0 * cell.T * cell.E * cell.O * 4,
        "peft_arrow": 4.0 * cell.T * cell.E * cell.O * cell.torch_dtype.itemsize,
    }


def candidates(cell: Cell, weights: Weights, tokens: Tokens, triton: Path | None = None) -> list[Candidate]:
    """Every candidate of the cell, the two plain ones first; `triton`: the folder that triton_peers imports from."""
    peers = Peers(weights)
    transient, traffic = transient_bytes(cell), traffic_bytes(cell)
    x = tokens.x

    def plain(i: int) -> Tensor:
        return F.linear(x, weights.W[i])

    found = [Candidate(PLAIN, plain, truth="plain"), Candidate(PLAIN_AGAIN, plain, truth="plain")]
    if cell.mode == "route":
        return found + _route_candidates(cell, weights, tokens)
    found.append(Candidate("ours", _ours(cell, weights, tokens, peers), own=True))
    for label in ("dense", "sort_loop", "grouped_mm", "gather_bmm", "torch_reference"):
        if wants(cell, label):
            call = _call(cell, weights, tokens, getattr(peers, label))
            if label == "torch_reference" and cell.mode == "routed":
                call = _reference_call(cell, weights, tokens)
            found.append(Candidate(label, call, transient=transient[label], traffic=traffic.get(label, 0.0)))
    if cell.mode in ("apply", "routed"):
        from . import compiled, peft_peers, triton_peers

        found += compiled.candidates(cell, weights, tokens)
        found += peft_peers.candidates(cell, weights, tokens, transient, traffic)
        found += triton_peers.candidates(cell, weights, tokens, triton)
    return found


def _ours(cell: Cell, weights: Weights, tokens: Tokens, peers: Peers) -> Callable[[int], Tensor]:
    if cell.mode == "routed":
        layers = weights.phatgoose_layers
        return lambda i: layers[i](tokens.x)
    return _call(cell, weights, tokens, peers.ours, tokens.experts)


def _call(
    cell: Cell, weights: Weights, tokens: Tokens, apply: Apply, experts: Tensor | None = None
) -> Callable[[int], Tensor]:
    """The peer as the suite wants it: with its own routing, with given ids, or (lora) with a given base as well."""
    x, w = tokens.x, tokens.weights
    experts = tokens.experts64 if experts is None else experts
    if cell.mode == "routed":
        return lambda i: apply(F.linear(x, weights.W[i]), x, i, *fast_route(x, weights.fast_gates[i], cell.K))
    if cell.mode == "apply":
        return lambda i: apply(F.linear(x, weights.W[i]), x, i, w, experts)
    # only the first call, the checked one, starts from the layer's output; a copy per call would be timed too
    base = tokens.plain.clone()
    return lambda i: apply(base, x, i, w, experts)


def _reference_call(cell: Cell, weights: Weights, tokens: Tokens) -> Callable[[int], Tensor]:
    x = tokens.x

    def call(i: int) -> Tensor:
        a, b = weights.A[i], weights.Bt[i].transpose(1, 2)
        return reference.routed_lora(F.linear(x, weights.W[i]), x, weights.gates[i], a, b, top_k=cell.K)[0]

    return call


def _route_candidates(cell: Cell, weights: Weights, tokens: Tokens) -> list[Candidate]:
    """Routing alone; each returns (weights [T,K], experts [T,K])."""
    x, layers = tokens.x, weights.phatgoose_layers
    return [
        Candidate("ours", lambda i: ops.route(x, layers[i].gates, top_k=cell.K), own=True, truth="routing"),
        Candidate("fast_route", lambda i: fast_route(x, weights.fast_gates[i], cell.K), truth="routing"),
    ]
