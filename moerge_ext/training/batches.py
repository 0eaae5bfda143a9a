"""Training data: ready batches or features to be batched, in an order that can be repeated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..routing.layers import execution_device

Batch = Mapping[str, Any]
Collate = Callable[[list[Any]], Batch]


class BatchSource:
    """Batches from whatever the caller has.

    With `collate_fn`, `data` is a sequence (list or map-style Dataset) of features: it is cut into batches of
    `batch_size`, shuffled anew every epoch from `seed` when `shuffle`. Without, `data` is an iterable of
    ready batches (dicts of tensors; a DataLoader) and is taken in its own order, again from the start when
    it ends. Resuming skips the batches already used, so that order must be the same in every run.
    """

    def __init__(
        self,
        data: Any,
        *,
        name: str = "data",
        collate_fn: Collate | None = None,
        batch_size: int = 8,
        shuffle: bool = False,
        seed: int = 0,
        digest: str | None = None,
    ) -> None:
        self.digest = digest  # of the data, where it is known
        self.name, self.data, self.collate_fn = name, data, collate_fn
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(data, (Mapping, str)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise ValueError(
                f"{name} must be an iterable of batches, or features with collate_fn; got {type(data).__name__}"
            )
        if hasattr(data, "__len__") and len(data) == 0:
            raise ValueError(f"{name} is empty: at least one batch is needed")
        if collate_fn is not None and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise ValueError(f"{name} with collate_fn must be a list or Dataset of features, got {type(data).__name__}")

    def facts(self) -> dict[str, Any]:
        """The settings that decide which batch comes when."""
        if self.collate_fn is None:
            return {}
        facts = {"batch_size": self.batch_size, "shuffle": self.shuffle, "examples": len(self.data)}
        return facts if self.digest is None else {**facts, "data": self.digest}

    def epoch(self, number: int = 0) -> Iterator[Batch]:
        """The batches of one pass over the data."""
        if self.collate_fn is None:
            yield from self.data
            return
        order: Sequence[int] = range(len(self.data))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + number)
            order = torch.randperm(len(self.data), generator=generator, device="cpu").tolist()
        for start in range(0, len(order), self.batch_size):
            yield self.collate_fn([self.data[i] for i in order[start : start + self.batch_size]])

    def stream(self, skip: int = 0) -> Iterator[Batch]:
        """Batches without end, from number `skip` on."""
        return itertools.islice(self._cycle(), skip, None)

    def _cycle(self) -> Iterator[Batch]:
        once = self.collate_fn is None and isinstance(self.data, Iterator)
        for number in itertools.count():
            count = 0
            for batch in self.epoch(number):
                count += 1
                yield batch
            if count == 0:
                raise ValueError(f"{self.name} is empty: at least one batch is needed")
            if once:
                raise ValueError(
                    f"{self.name} ended after {count} batches and cannot be read again: pass a list or a "
                    "DataLoader, or an iterator with steps * accumulate batches"
                )


def as_source(
    data: Iterable[Any], validation: Iterable[Any] | None, **batching: Any
) -> tuple[BatchSource, BatchSource | None]:
    """The sources for training and validation data that are batched alike (validation is never shuffled)."""
    train = BatchSource(data, **batching)
    if validation is None:
        return train, None
    if batching.get("collate_fn") is None and isinstance(validation, Iterator):
        validation = list(validation)  # it is read at every evaluation
    return train, BatchSource(validation, **{**batching, "name": "validation", "shuffle": False})


def run_model(model: nn.Module, batch: Batch) -> Any:
    """`model(**batch)`, the batch's tensors moved to the model's device."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch must be a dict of tensors, got {type(batch).__name__}; features need a collate_fn")
    device = model_device(model)
    return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


def model_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs; of an offloaded model, where its layers compute."""
    device = getattr(model, "device", None)
    device = device if isinstance(device, torch.device) else next(model.parameters()).device
    if device.type != "meta":
        return device
    hooked = (execution_device(module) for module in model.modules() if hasattr(module, "_hf_hook"))
    return next((found for found in hooked if found.type != "meta"), device)
