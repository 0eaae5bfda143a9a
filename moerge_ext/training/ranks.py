"""One training run in several processes (torchrun): each computes on its own data, all end with the same."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and which of them this is. For one process alone every method is free."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows progress."""
        return self.rank == 0

    def mean(self, values: Sequence[float]) -> list[float]:
        """Each value's mean over the ranks."""
        return [total / self.size for total in self.total(values)]

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the ranks."""
        if self.size == 1:
            return list(values)
        return self.added(torch.tensor(list(values), dtype=torch.float64, device="cpu")).tolist()

    def added(self, tensor: Tensor) -> Tensor:
        """The tensor's sum over the ranks, on the CPU."""
        if self.size == 1:
            return tensor
        there = tensor.to(_meeting_device())
        distributed.all_reduce(there)
        return there.cpu()

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes its mean over the ranks; a rank without one counts as zero.

        FSDP2's sharded parameters are left out: FSDP2 has reduced their gradients already.
        """
        if self.size == 1:
            return
        plain = [p for p in parameters if not is_sharded(p)]
        counts = self.total([float(p.grad is not None) for p in plain])
        for p, count in zip(plain, counts, strict=True):
            if not count:
                continue  # none has one: AdamW is not to count a step
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = self.added(gradient).to(p.device) / self.size

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values, in place."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                if not is_sharded(tensor):
                    there = tensor.detach().to(_meeting_device()).contiguous()
                    distributed.broadcast(there, 0)
                    tensor.copy_(there)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make()` returns on rank 0, where alone it is called, on every rank; its error as well."""
        if self.size == 1:
            return make()
        made: list[Any] = [None]
        with self.together():
            if self.first:
                made = [make()]
        distributed.broadcast_object_list(made, 0)
        return made[0]

    def alike(self, facts: dict[str, Any], caller: str) -> None:
        """ValueError on every rank when the ranks were called with different facts, which could never end alike."""
        if self.size == 1:
            return
        theirs = self._gathered(facts)
        problems = [
            f"{key}: {theirs[0].get(key)!r} on rank 0, {other.get(key)!r} on rank {rank}"
            for rank, other in enumerate(theirs)
            for key in sorted(theirs[0].keys() | other.keys())
            if theirs[0].get(key) != other.get(key)
        ]
        if problems:
            raise ValueError(f"{caller} must be called alike on every rank:\n- " + "\n- ".join(problems))

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of one rank inside the block is an error of all after it, so that none waits for the others."""
        if self.size == 1:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        said = self._gathered(None if own is None else f"{type(own).__name__}: {own}")
        if own is not None:
            raise own
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]
        if failed:
            raise RuntimeError("another rank failed:\n- " + "\n- ".join(failed))

    def _gathered(self, value: Any) -> list[Any]:
        values = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


def current_ranks() -> Ranks:
    """The ranks of the default process group, which is made when torchrun has started this process and there is none.

    Every rank must then make the same calls: one that is left out is waited for.
    """
    if not distributed.is_available():
        return Ranks()
    if not distributed.is_initialized():
        if not distributed.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
            return Ranks()
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is FSDP2's: a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, detached; gathered from all ranks, which must all ask, when each holds a part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def _meeting_device() -> torch.device:
    """Where the process group exchanges tensors."""
    if "gloo" in distributed.get_backend_config():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
