"""A stand-in for an engine's worker: packed tokens through layers of several modules, alone or as one of ranks."""

from __future__ import annotations

from pathlib import Path

import builders
import torch
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.routing.routed_linear import RoutedLinear
from moerge_ext.routing.shares import Share
from moerge_ext.serving.branch import Branch, PartialBranch
from moerge_ext.serving.pool import Pool, gate_sums, planned, variants
from moerge_ext.serving.settings import Settings
from moerge_ext.serving.slices import Segment, shares
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


def tables_of(pool: Pool, tokens: int = 64, requests: int = 8, fixed: bool = False, spare: int = 0) -> Tables:
    methods = {made.method.name: made.bias for made in pool.methods}
    sizes = {"max_requests": requests, "max_tokens": tokens, "spare": spare}
    return Tables(len(pool.names), methods, **sizes, device=torch.device("cpu"), fixed=fixed)


class Packed:
    """q, k and v as one layer of one rank: `weight` and branches for its slices of the output."""

    def __init__(self, model: nn.Module, pool: Pool, tables: Tables, rank: int = 0, ranks: int = 1, spare: int = 0):
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
        kept = {"adds_bias": True, "spare": spare}
        self.branches = [
            Branch(module, share, variants(pool, module, share, **kept), tables, cpu) for module, share in held.items()
        ]
        self.shares = held

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight)
        for branch in self.branches:
            branch.add(y, x)
        return y


class RowParallel:
    """The down projection of one of several ranks: x [T,D/ranks], the sum over ranks is the layer's output."""

    def __init__(self, model: nn.Module, pool: Pool, tables: Tables, rank: int, ranks: int, reduce, spare: int = 0):
        wide, features = pool.sizes[DOWN]
        size = wide // ranks
        share = Share(0, features, ((0, features),), (rank * size, size))
        self.weight = model.get_submodule(DOWN).weight[:, rank * size : (rank + 1) * size]
        kept = {"whole": wide, "gate_sums": gate_sums(pool, DOWN, spare), "reduce": reduce}
        made = variants(pool, DOWN, share, adds_bias=rank == 0, spare=spare)
        self.branch = PartialBranch(DOWN, share, made, tables, torch.device("cpu"), **kept)
        self.share, self.adds_bias = share, rank == 0
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
