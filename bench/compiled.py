"""The peers under torch.compile. Compiling unrolls the reference's loop over experts: minutes for many experts."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moerge_ext import reference

from .cells import Cell, wants
from .data import Tokens, Weights
from .fast_route import fast_route
from .timing import Candidate


def candidates(cell: Cell, weights: Weights, tokens: Tokens) -> list[Candidate]:
    """Those the cell asks for, compiled here (the note says in how many seconds)."""
    found = []
    for label, build in (("compiled_reference", _reference), ("compiled_dense", _dense)):
        if wants(cell, label, compiles=True):
            torch._dynamo.reset()
            call = build(cell, weights, tokens)
            begin = time.perf_counter()
            try:
                call(0)
            except Exception as error:  # compiled code that fails is this candidate's row and not the run's end
                call = _failing(error)
            found.append(Candidate(label, call, note=f"compiled in {time.perf_counter() - begin:.0f} s"))
    return found


def _failing(error: Exception) -> Callable[[int], Tensor]:
    def call(i: int) -> Tensor:
        raise error

    return call


def _reference(cell: Cell, weights: Weights, tokens: Tokens) -> Callable[[int], Tensor]:
    top_k, routed = cell.K, cell.mode == "routed"

    @torch.compile(dynamic=False)
    def linear(x: Tensor, w: Tensor, gates: Tensor, a: Tensor, bt: Tensor, mix: Tensor, experts: Tensor) -> Tensor:
        base, b = F.linear(x, w), bt.transpose(1, 2)
        if routed:
            return reference.routed_lora(base, x, gates, a, b, top_k=top_k)[0]
        return reference.lora_apply(base, x, a, b, mix, experts)

    def call(i: int) -> Tensor:
        parts = (weights.W[i], weights.gates[i], weights.A[i], weights.Bt[i])
        return linear(tokens.x, *parts, tokens.weights, tokens.experts)

    return call


def _dense(cell: Cell, weights: Weights, tokens: Tokens) -> Callable[[int], Tensor]:
    top_k, routed, n_experts, rank = cell.K, cell.mode == "routed", cell.E, cell.R

    @torch.compile(dynamic=False)
    def linear(x: Tensor, w: Tensor, gates: Tensor, a: Tensor, bt: Tensor, mix: Tensor, experts: Tensor) -> Tensor:
        if routed:
            mix, experts = fast_route(x, gates, top_k)
        mask = x.new_zeros(len(x), n_experts).scatter(1, experts, mix.to(x.dtype))
        h = (x @ a.view(n_experts * rank, -1).T).view(-1, n_experts, rank) * mask[:, :, None]
        return torch.addmm(F.linear(x, w), h.view(-1, n_experts * rank), bt.view(n_experts * rank, -1))

    def call(i: int) -> Tensor:
        parts = (weights.W[i], weights.fast_gates[i], weights.A[i], weights.Bt[i])
        return linear(tokens.x, *parts, tokens.weights, tokens.experts64)

    return call
