"""What one of two processes does in test_ranks.py; what it finds goes to a file of its own.

Also a script for torchrun: `torchrun --nproc_per_node 2 ranks_worker.py FOLDER`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from builders import write_adapter
from torch import distributed, nn

from moerge_ext.experts.gates import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.experts import train_expert
from moerge_ext.training.gated_lora import gated_model
from moerge_ext.training.gates import train_gates

WIDTH, RANKS = 6, 2
OPTIONS = {"steps": 4, "lr": 0.02, "progress": False}


class Output(NamedTuple):
    """A tuple, in which FSDP2 finds the tensors that gradients come back through."""

    loss: torch.Tensor


class Model(nn.Module):
    """Two linear layers; the second runs only on batches with `deep`."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, labels=None, deep=True):
        y = self.dropout(torch.tanh(self.first(x)))
        y = self.second(y) if deep else y
        return Output((y - labels).square().mean())


def still() -> Model:
    """Without dropout, whose draws cannot be the same for one batch and for its halves."""
    model = Model()
    model.dropout.p = 0.0
    return model


def expert(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    factors = {path: (draw(2, WIDTH), draw(WIDTH, 2)) for path in ("first", "second")}
    return write_adapter(folder, factors, r=2, alpha=2)


def data(part: int | None = None, count: int = 6, **more) -> list[dict]:
    """Batches of 4 rows; with `part` every second of them, beginning there."""
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(4, 3, WIDTH, generator=generator)  # noqa: E731
    made = [{"x": draw(), "labels": draw(), **more} for _ in range(count)]
    return made if part is None else made[part::RANKS]


def joint() -> list[dict]:
    """The batches of both ranks in one."""
    both = zip(data(0), data(1), strict=True)
    return [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in both]


def work(rank: int, folder: Path) -> dict:
    """Everything that two processes do; rank 0 alone writes."""
    found: dict = {}
    validation = data(rank)
    result = train_gates(still(), folder / "gates", data(rank), validation=validation, eval_every=2, **OPTIONS)
    found["losses"], found["validation"] = result.losses, list(result.validation.values())
    found["gates"] = gates(folder / "gates")

    wrapped = nn.parallel.DistributedDataParallel(Model())
    train_gates(wrapped, folder / "dropout", data(rank), **OPTIONS)
    train_gates(torch.compile(still()), folder / "joint", data(rank), joint=True, output_dir=folder / "out", **OPTIONS)

    # the second layer runs on rank 1 alone
    train_gates(still(), folder / "uneven", data(rank, deep=rank == 1), **OPTIONS)

    average_activation(still(), folder / "mean", data(rank), progress=False)
    wrapped = nn.parallel.DistributedDataParallel(still())
    train_expert(wrapped, data(rank), folder / "expert", rank=2, target_modules=["first", "second"], **OPTIONS)

    found["failed"] = said(lambda: train_gates(still(), folder / "bad", iter(data(rank)[: 2 + rank]), **OPTIONS))
    options = {**OPTIONS, "lr": 0.1 * (rank + 1)}
    found["differ"] = said(lambda: train_gates(still(), folder / "bad", data(rank), **options))
    found["written"] = sorted(path.name for path in (folder / "bad").iterdir())
    resume(rank, folder, found)
    return found


def resume(rank: int, folder: Path, found: dict) -> None:
    """A run that is killed after 3 of 4 steps goes on."""
    options = {**OPTIONS, "checkpoint_every": 1}
    found["killed"] = said(lambda: train_gates(still(), folder / "resumed", iter(data(rank)[:3]), **options))
    train_gates(still(), folder / "resumed", data(rank), resume=True, **options)


def sharded(rank: int, folder: Path) -> dict:
    """FSDP2, around the base and around the gates."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = still()
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train_gates(model, folder / "sharded base", data(rank), **OPTIONS)

    model = still()
    with gated_model(model, folder / "sharded gates") as gated:
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(gated.parameters().values(), lr=0.02, weight_decay=0.0)
        for step in range(OPTIONS["steps"]):
            optimizer.zero_grad()
            model(**data(rank)[step % 3]).loss.backward()
            optimizer.step()
        kinds = {type(p).__name__ for p in gated.parameters().values()}
        best = gated.snapshot()
        gated.restore(best)
        gated.save()
    return {"kinds": sorted(kinds)}


def gates(folder: Path) -> dict[str, list[float]]:
    return {path: gate.tolist() for path, gate in read_gates(folder)["sigmoid-gate"].gates.items()}


def said(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run(rank: int, folder: str, port: int | None, job: str) -> None:
    torch.set_num_threads(1)
    if port is not None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    found = globals()[job](rank, Path(folder))
    (Path(folder) / f"{job}.{rank}.json").write_text(json.dumps(found))
    if port is not None:
        distributed.destroy_process_group()


if __name__ == "__main__":
    run(int(os.environ["RANK"]), sys.argv[1], None, "work")
