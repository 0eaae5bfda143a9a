"""One of several processes over gloo: its share of a packed and of a row-parallel layer against the whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import builders  # noqa: E402
from serving_cases import DOWN, QKV, Packed, RowParallel, layers, patched, served, tables_of, tokens  # noqa: E402

from moerge_ext.routing.shares import share_of_plan  # noqa: E402
from moerge_ext.serving.live import Change, LivePool  # noqa: E402
from moerge_ext.serving.requests import Choice  # noqa: E402
from moerge_ext.serving.settings import Settings  # noqa: E402


def main(rank: int, ranks: int, meeting: str, method: str, *experts: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)

    def reduce(part: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(part)
        return part

    methods = [] if method.startswith(("merged", "expert:")) else ["arrow", "glider_code"]
    pool = served(list(experts), method=method, methods=[m for m in methods if m != method])
    model, handle = patched(list(experts), method)
    tables = tables_of(pool)
    packed = Packed(builders.tiny_llama(), pool, tables, rank, ranks)
    row = RowParallel(builders.tiny_llama(), pool, tables, rank, ranks, reduce)
    for mean in (0.0, 1000.0):
        x, wide = tokens(33, 32, mean=mean), tokens(33, 48, seed=1, mean=mean)
        close(row(wide), layers(model, (DOWN,), wide), f"row parallel, mean {mean}")
        close(packed(x), own_part(layers(model, QKV, x), rank, ranks), f"column parallel, mean {mean}")
    if methods:
        requests(pool, tables, row, list(experts), tokens(12, 48, seed=2))
    chosen(row, tokens(33, 48, seed=3), ranks)
    if methods:
        live(method, list(experts), rank, ranks, reduce)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo may outlive their group, which ends the interpreter's own exit by SIGABRT


def own_part(whole: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """q, k and v features of this rank's heads."""
    q, k, v = whole.split([32, 16, 16], -1)
    return torch.cat([part.chunk(ranks, -1)[rank] for part in (q, k, v)], -1)


def close(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = (got - want).abs().max() / want.abs().max()
    assert error < 1e-5, f"{what}: {error:.2e}"


def requests(pool, tables, row, experts: list[str], x: torch.Tensor) -> None:
    """Weights, affinities and the base alone, on a layer whose input is shared out."""
    weights, affinities = (0.0, 2.0, -0.5, 0.0), (0.2, 0.0, 0.9, 0.1)
    tables.begin([Choice(None, weights=weights), Choice("glider_code", affinities=affinities), Choice(None)], [5, 4, 3])
    got = row(x).split([5, 4, 3])
    for part, mine, method, scores in zip(
        x.split([5, 4, 3]), got, ("given", "glider_code", None), (weights, affinities, None), strict=True
    ):
        model, handle = patched(experts, method or "phatgoose")
        with handle.disabled() if method is None else handle.affinities(torch.tensor(scores)):
            close(mine, layers(model, (DOWN,), part), f"a request of {method}")
    tables.begin([None], [12])


def live(method: str, experts: list[str], rank: int, ranks: int, reduce) -> None:
    """An expert joins, and another leaves, on every rank: as the patched model has them."""
    said = {"method": method, "spare": 1}
    pool = served(experts[:3], **said)
    tables, model = tables_of(pool, spare=1), builders.tiny_llama()
    packed = Packed(model, pool, tables, rank, ranks, spare=1)
    row = RowParallel(model, pool, tables, rank, ranks, reduce, spare=1)
    shares = packed.shares | {DOWN: row.share}
    branches = {branch.path: branch for branch in (*packed.branches, row.branch)}

    def share(module, plan):
        return share_of_plan(plan, shares[module], adds_bias=module != DOWN or row.adds_bias)

    settings = Settings.parse({"experts": experts[:3]} | said)
    changed = LivePool(settings, None, model, pool.names, pool.sizes, pool.modules, branches, tables, share)
    for change, left in ((Change("dog", experts[3]), experts), (Change("ant"), experts[1:])):
        changed.prepare(change)
        changed.commit()
        model, _ = patched(left, method)
        tables.begin([None], [33])
        x, wide = tokens(33, 32, seed=4), tokens(33, 48, seed=5)
        close(row(wide), layers(model, (DOWN,), wide), f"row parallel after {change}")
        close(packed(x), own_part(layers(model, QKV, x), rank, ranks), f"column parallel after {change}")


def chosen(row, x: torch.Tensor, ranks: int) -> None:
    """Every rank chooses the same experts with the same weights, bit for bit."""
    from moerge_ext import ops

    if row.branch.bank is None:  # of a method that routes nothing
        return
    seen, real = [], ops.route

    def spy(*args, **options):
        seen.extend(real(*args, **options))
        return seen[-2:]

    ops.route = spy
    try:
        row(x)
    finally:
        ops.route = real
    assert len(seen) == 2, "nothing was chosen"
    mine = torch.cat([seen[0].view(torch.int32), seen[1]])
    all_of_them = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(all_of_them, mine)
    assert all(torch.equal(other, mine) for other in all_of_them), "the ranks chose differently"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
