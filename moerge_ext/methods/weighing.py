"""Routers that no option of `route` expresses: weights of all experts for every token, in plain torch.

A `Weigher` holds the trained tensors of one router. Layers of a patched model call it; a router of a whole layer or
block is one object that several of them share, and reads the block's input through a hook.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OWN_TOKENS = (
    "a router of a block is for modules that see the block's tokens (no cross-attention); leave the module out: "
    "load_experts(..., modules=...)"
)


@dataclass(frozen=True)
class Place:
    """Where one router is: its path, E experts, D features of what it reads, O of what the module gives (0 for a router
    of several modules), and the features of what all routers have in common (0 for nothing)."""

    path: str
    experts: int
    width: int
    out: int = 0
    common: int = 0


class Weigher(nn.Module):
    """Weights [T,E] of E experts for T tokens, from float32 tensors outside of the state dict.

    `reads`: the path of the block whose input is scored for all its modules; None: every layer's own input.
    A subclass says the `shapes` of its tensors at a `Place`, how they `start`, and what `weigh` makes of tokens.
    """

    reads: str | None = None
    path: str  # of the module, or of the block, that it is for
    common: nn.Module | None  # what all routers of the method have in common, for the rows that have that
    fixed: tuple[str, ...] = ()  # tensors that are kept as they began
    softmaxed = True  # whether the weights are a softmax of `scores`, which is what balance and z-losses are about

    def __init__(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], reads: str | None = None):
        super().__init__()
        self.options, self.reads = dict(options), reads
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().to(torch.float32, copy=True), persistent=False)
        self.register_buffer("without", None, persistent=False)  # [E] bool: who is left out, None for nobody
        self._now = threading.local()  # what the block's input gave, in this thread

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the tensors."""
        raise NotImplementedError

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        """The tensors before training: zeros, unless a subclass says otherwise."""
        return {
            name: torch.zeros(shape, dtype=torch.float32, device="cpu")
            for name, shape in cls.shapes(place, options).items()
        }

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        """x [T,D] float -> [T,E]; `bank` is the layer, with lora_A [E,R,D] and lora_B [E,O,R]."""
        raise NotImplementedError

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """scores [T,E] -> weights [T,E]; who is not in `mask` [E] or [T,E] has weight 0."""
        return masked_softmax(scores, mask)

    def finish(self, branch: Tensor, x: Tensor) -> Tensor:
        """What the base layer's output gets: of the experts' weighted sum `branch` [T,O] and the input x [T,D]."""
        return branch

    def penalty(self) -> Tensor | None:
        """What training adds to the loss for these tensors."""
        return None

    @property
    def finishes(self) -> bool:
        """Whether `finish` changes anything."""
        return type(self).finish is not Weigher.finish

    def forward(self, x: Tensor, bank: Any, bias: Tensor | None = None) -> Tensor:
        """x [T,D] of a layer -> weights [T,E]; bias [T,E] is added to the scores."""
        eligible = both(self.without_mask(), bank.mask)
        if self.reads is None:
            scores = self.scores(x.to(working(x)), bank)
            return self.weigh(scores if bias is None else scores + bias, eligible)
        weights = getattr(self._now, "weights", None)
        if weights is None:
            raise RuntimeError(f"{bank.name}: '{self.reads}', whose input its router reads, did not run around it")
        if len(weights) != len(x):
            raise RuntimeError(
                f"{bank.name} gets {len(x)} tokens, and '{self.reads}', whose input its router reads, got "
                f"{len(weights)}: {_OWN_TOKENS}"
            )
        return weights

    def check_input(self, x: Tensor, name: str) -> None:
        """RuntimeError when the layer `name` gets another input of the block, which may have as many tokens."""
        if any(x is other for other in getattr(self._now, "others", ())):
            raise RuntimeError(
                f"{name} gets another input of '{self.reads}' than the one its router reads: {_OWN_TOKENS}"
            )

    def without_mask(self) -> Tensor | None:
        """[E] bool: who may be weighed, None for everybody."""
        return None if self.without is None else ~self.without

    def read(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the block that the router reads."""
        u = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(u, Tensor):
            raise RuntimeError(f"'{self.reads}' ({type(block).__name__}) got no tensor first, which its router reads")
        width = self.read_width()
        if width is not None and u.shape[-1] != width:
            raise RuntimeError(f"'{self.reads}' got {u.shape[-1]} features, its router is for D={width}")
        with torch.autocast(u.device.type, enabled=False):
            self._now.weights = self.of_block(u.to(working(u)))
        self._now.others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v is not u]

    def read_width(self) -> int | None:
        """D of the block's input, None when it does not matter."""
        return None

    def of_block(self, u: Tensor) -> Tensor:
        """The block's input u [..., D] -> weights [T,E]."""
        return self.weigh(self.scores(u.flatten(0, -2), None), self.without_mask())

    def forget(self, *_: Any) -> None:
        """A forward hook of the block: its modules are done."""
        self._now.weights, self._now.others = None, ()

    def _apply(self, fn, recurse=True):
        kept = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_now"] = threading.local()


class TaskLora(Weigher):
    """A router with a LoRA of the task's own beside the experts, of rank `task_rank`: it adds B' A' x."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        rank = options["task_rank"]
        return {"task_A": (rank, place.width), "task_B": (place.out, rank)}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        made = super().start(place, options, generator)
        return made | {"task_A": draw((options["task_rank"], place.width), place.width**-0.5, generator)}

    def finish(self, branch: Tensor, x: Tensor) -> Tensor:
        shrunk = nn.functional.linear(x.to(self.task_A.dtype), self.task_A)
        return branch + nn.functional.linear(shrunk, self.task_B)


def working(x: Tensor) -> torch.dtype:
    """The type that routers compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Two masks as one."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scores [T,E] over the experts in `mask` [E] or [T,E], 0 for the others and where there are none."""
    if mask is None:
        return scores.softmax(-1)
    filled = scores.masked_fill(~mask, -torch.inf)
    nobody = ~mask.any(-1, keepdim=True)
    return filled.masked_fill(nobody, 0.0).softmax(-1).masked_fill(~mask, 0.0)


def draw(shape: tuple[int, ...], deviation: float, generator: torch.Generator) -> Tensor:
    """Normal numbers of a deviation."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * deviation
