"""Banks of one module and plain-torch evaluation of a method's plan and routing, for the tests of methods."""

from __future__ import annotations

import dataclasses

import torch

from moerge_ext import reference
from moerge_ext.experts.bank import ExpertBank, ModuleBank
from moerge_ext.methods import get_method
from moerge_ext.methods.base import Plan

MODULE = "model.layers.0.self_attn.q_proj"
SIGMOID, AVERAGE = "sigmoid-gate", "average-activation"
E, R, D, O = 5, 4, 24, 20  # noqa: E741


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_bank(lora_A, lora_B, *, bias=None, present=None, ranks=None, gates=None, has_gate=None, kind=SIGMOID):
    """A bank of one module. Rows of absent experts and of unused ranks are zeroed as the loader does."""
    count = lora_A.shape[0]
    present = torch.ones(count, dtype=torch.bool) if present is None else torch.tensor(present, dtype=torch.bool)
    ranks = [lora_A.shape[1]] * count if ranks is None else list(ranks)
    ranks = [rank if here else 0 for rank, here in zip(ranks, present.tolist(), strict=True)]
    lora_A, lora_B = lora_A.clone(), lora_B.clone()
    for e, rank in enumerate(ranks):
        lora_A[e, rank:] = 0
        lora_B[e, :, rank:] = 0
    if bias is not None:
        bias = bias * present[:, None]
    flags = None if has_gate is None else {kind: torch.tensor(has_gate)}
    module = ModuleBank(
        lora_A,
        lora_B,
        bias,
        present=present,
        ranks=ranks,
        gates=None if gates is None else {kind: gates},
        has_gate=flags,
    )
    return ExpertBank([f"e{i}" for i in range(count)], {MODULE: module})


def random_bank(dtype=torch.float32, **kwargs):
    kwargs.setdefault("gates", randn(E, D, seed=3))
    return make_bank(randn(E, R, D, seed=1, dtype=dtype), randn(E, O, R, seed=2, dtype=dtype), **kwargs)


def both_kinds(bank):
    for kind in (SIGMOID, AVERAGE):
        for e in range(len(bank)):
            bank.set_gates(e, {MODULE: randn(D, seed=40 + e)}, kind=kind)
    return bank


def build(name, bank, **overrides):
    """(plan, routing, aggregation, options) of one method on the bank's module."""
    method = get_method(name)
    routing, aggregation, options = method.configure(**overrides)
    return method.plan(bank, bank.modules[MODULE], MODULE, options), routing, aggregation, options


def route(plan: Plan, routing, x, bias=None):
    """(weights [T, K], experts [T, K]) as `patch` would ask `route` for them."""
    count = plan.lora_A.shape[0]
    if routing is None:
        tokens = x.shape[0]
        return plan.weights.expand(tokens, count), torch.arange(count, dtype=torch.int32).expand(tokens, count)
    return reference.route(
        x,
        plan.gates,
        top_k=count if routing.top_k is None else routing.top_k,
        normalize=routing.normalize,
        absolute=routing.absolute,
        scale=routing.resolved_scale(plan.lora_A.shape[2], count),
        bias=bias,
        mask=plan.mask,
        top_p=routing.top_p,
        weighting=routing.weighting,
    )


def branch(name, bank, x, base=None, affinities=None, gates=None, **overrides):
    """y [T, O] of the method on tokens x [T, D]; `gates` replaces the plan's."""
    plan, routing, aggregation, options = build(name, bank, **overrides)
    if gates is not None:
        plan = dataclasses.replace(plan, gates=gates)
    bias = None if affinities is None else get_method(name).bias(affinities, options)
    weights, experts = route(plan, routing, x, bias)
    if base is None:
        base = x.new_zeros(x.shape[0], plan.lora_B.shape[1])
    return reference.lora_apply(
        base,
        x,
        plan.lora_A,
        plan.lora_B,
        weights,
        experts,
        lora_bias=plan.lora_bias,
        factored=aggregation == "factored",
    )


def dense(weights, experts, count):
    """[T, K] weights and ids -> [T, count]."""
    return torch.zeros(weights.shape[0], count, dtype=weights.dtype).scatter_add(1, experts.long(), weights)


def relative(got, want):
    return ((got - want).abs().max() / want.abs().max()).item()


def deltas(bank):
    module = bank.modules[MODULE]
    return module.lora_B.double() @ module.lora_A.double()  # [E, O, D]
