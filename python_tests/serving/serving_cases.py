"""A stand-in for an engine's worker: packed tokens through layers of several modules, alone or as one of ranks."""

from __future__ import annotations

from pathlib import Path

import builders
import torch
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.routing.routed_linear import RoutedLinear
from moerge_ext.serving.branch import Branch, PartialBranch, Variant, route_options
from moerge_ext.serving.pool import Pool, planned
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.slices import Segment, Share, share_of_plan, shares
from moerge_ext.serving.tables import Tables

NAMES = ("ant", "bee", "cat", "dog")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK = "model.layers.0"
QKV = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
DOWN = f"{BLOCK}.mlp.down_proj"
HEADS, KV_HEADS, HEAD = 4, 2, 8  # of tiny_llama


def folders(root: Path, **options) -> list[str]:
    """Experts for tiny_llama on all linears, with gates of both kinds."""
    made = builders.random_experts(builders.tiny_llama(), root, NAMES, LINEARS, **options)
    builders.random_experts(builders.tiny_llama(), root, NAMES, LINEARS, gates="average-activation", **options)
    return [str(made[name]) for name in NAMES]


def served(experts: list[str], **said) -> Pool:
    """What a server plans for tiny_llama."""
    settings = Settings.parse({"experts": experts} | said)
    return planned(settings, settings.load(None), builders.tiny_llama())


def tables_of(pool: Pool, tokens: int = 64, requests: int = 8, fixed: bool = False) -> Tables:
    methods = {made.method.name: made.bias for made in pool.methods}
    sizes = {"max_requests": requests, "max_tokens": tokens}
    return Tables(len(pool.names), methods, **sizes, device=torch.device("cpu"), fixed=fixed)


def variants(pool: Pool, module: str, share: Share, adds_bias: bool = True) -> list[Variant]:
    found = []
    for made in pool.methods:
        plan = share_of_plan(made.plans[module], share, adds_bias=adds_bias)
        options = route_options(made.routing, pool.sizes[module][0], plan.lora_A.shape[0])
        found.append(Variant(made.method.name, plan, options, made.factored))
    return found


class Packed:
    """q, k and v as one layer of one rank: `weight` and branches for its slices of the output."""

    def __init__(self, model: nn.Module, pool: Pool, tables: Tables, rank: int = 0, ranks: int = 1):
        heads, kv = HEADS // ranks, max(1, KV_HEADS // ranks)
        at = rank // max(1, ranks // KV_HEADS)
        segments = [Segment(heads * HEAD, rank * heads * HEAD, HEADS * HEAD)]
        segments += [Segment(kv * HEAD, at * kv * HEAD, KV_HEADS * HEAD)] * 2
        held = shares(segments, {module: pool.sizes[module][1] for module in QKV})
        rows = [
            model.get_submodule(module).weight[start : start + size]
            for module in QKV
            for start, size in held[module].rows
        ]
        self.weight = torch.cat(rows)
        cpu = torch.device("cpu")
        self.branches = [
            Branch(module, share, variants(pool, module, share), tables, cpu) for module, share in held.items()
        ]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        for branch in self.branches:
            branch.add(y, x)
        return y


class RowParallel:
    """The down projection of one of several ranks: x [T,D/ranks], the sum over ranks is the layer's output."""

    def __init__(self, model: nn.Module, pool: Pool, tables: Tables, rank: int, ranks: int, reduce):
        wide, features = pool.sizes[DOWN]
        size = wide // ranks
        share = Share(0, features, ((0, features),), (rank * size, size))
        self.weight = model.get_submodule(DOWN).weight[:, rank * size : (rank + 1) * size]
        gates = {made.method.name: made.plans[DOWN].gates for made in pool.methods}
        sums = {name: g.double().sum(1) for name, g in gates.items() if g is not None}
        kept = {"whole": wide, "gate_sums": sums, "reduce": reduce}
        made = variants(pool, DOWN, share, adds_bias=rank == 0)
        self.branch = PartialBranch(DOWN, share, made, tables, torch.device("cpu"), **kept)
        self.reduce, self.columns = reduce, slice(rank * size, (rank + 1) * size)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        mine = x[:, self.columns].contiguous()
        y = nn.functional.linear(mine, self.weight)
        self.branch.add(y, mine)
        return self.reduce(y)


def patched(experts: list[str], method: str, **options) -> tuple[nn.Module, moerge.Handle]:
    """The same experts as `patch` puts them on a model: what a server must agree with."""
    model = builders.tiny_llama()
    return model, moerge.patch(model, moerge.load_experts(experts), method, **options)


@torch.no_grad()
def layers(model: nn.Module, modules: tuple[str, ...], x: Tensor) -> Tensor:
    """The outputs of patched modules side by side."""
    found = [model.get_submodule(module) for module in modules]
    assert all(isinstance(layer, RoutedLinear) for layer in found)
    return torch.cat([layer(x) for layer in found], -1)


def tokens(count: int, width: int, seed: int = 0, mean: float = 0.3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean
