"""What experts do to a layer that is no LoRA: the tensors of E experts of one kind, stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats.adapter import BOTTLENECK, SCALE_IN, SCALE_OUT, BottleneckWeights, ScaleWeights

AFTER = "after_residual"


def kind_name(kind: str) -> str:
    """What a kind of branch is called in messages."""
    return "bottleneck adapter" if kind.startswith(BOTTLENECK) else "(IA)3"


def neutral(kind: str) -> float:
    """What stands in the rows of experts that are not of the kind."""
    return 0.0 if kind.startswith(BOTTLENECK) else 1.0


@dataclass(frozen=True)
class Branch:
    """One kind of module of E experts at one layer.

    kind, with its tensors:
        scale_in     "scale" [E,D] float32: y = W (scale_e * x) + b           (IA)3 on the input
        scale_out    "scale" [E,O] float32: y = scale_e * (W x + b)           (IA)3 on the output
        bottleneck/<activation>, bottleneck/<activation>/after_residual
                     "down" [E,M,O], "down_bias" [E,M], "up" [E,O,M], "up_bias" [E,O] float32, the scaling folded into
                     the latter two, padded with zeros to the largest M: see `formats/bottleneck.py`
    present [E] bool on the CPU: which experts are of this kind here; the rows of the others change nothing.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    present: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str | None = None) -> Branch:
        """On another device; they stay float32, as gates do."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def take(self, experts: Sequence[int]) -> Branch:
        """A copy of the rows of these experts, in this order."""
        rows = list(experts)
        tensors = {name: tensor[rows].clone() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, present=self.present[rows])

    def works(self) -> Tensor:
        """[E] bool on the CPU: which experts change anything here."""
        last = [tensor for name, tensor in self.tensors.items() if not name.startswith("down")]
        return torch.stack([(t != neutral(self.kind)).flatten(1).any(1) for t in last]).any(0).cpu()

    def finite(self) -> Tensor:
        """[E] bool on the CPU."""
        return torch.stack([torch.isfinite(t).flatten(1).all(1) for t in self.tensors.values()]).all(0).cpu()


Branches = Mapping[str, Branch]  # by kind
Rows = dict[int, ScaleWeights | BottleneckWeights]  # by expert


def stacked_branches(rows: Rows, num: int, device: torch.device) -> dict[str, Branch]:
    """The branches of `num` experts of which `rows` {expert: weights} are no LoRA."""
    by_kind: dict[str, dict[int, dict[str, Tensor]]] = {}
    for e, weights in rows.items():
        kind, own = _as_branch(weights)
        by_kind.setdefault(kind, {})[e] = own
    return {kind: _stacked(kind, found, num, device) for kind, found in by_kind.items()}


def joined(parts: Iterable[tuple[Branches, Sequence[int]]]) -> dict[str, Branch]:
    """One set of branches in which each part gives the rows of the experts that are named beside it."""
    by_kind: dict[str, dict[int, dict[str, Tensor]]] = {}
    num, device = 0, torch.device("cpu")
    for branches, experts in parts:
        for kind, branch in branches.items():
            num, device = len(branch.present), next(iter(branch.tensors.values())).device
            for e in experts:
                if branch.present[e]:
                    own = {name: tensor[e] for name, tensor in branch.tensors.items()}
                    by_kind.setdefault(kind, {})[e] = own
    return {kind: _stacked(kind, found, num, device) for kind, found in by_kind.items()}


def _stacked(kind: str, rows: Mapping[int, Mapping[str, Tensor]], num: int, device: torch.device) -> Branch:
    """Rows of different sizes (M of bottlenecks) are padded."""
    present = torch.zeros(num, dtype=torch.bool, device="cpu")
    present[list(rows)] = True
    tensors = {}
    for name in next(iter(rows.values())):
        size = [max(sizes) for sizes in zip(*(own[name].shape for own in rows.values()), strict=True)]
        tensors[name] = torch.full((num, *size), neutral(kind), dtype=torch.float32, device=device)
        for e, own in rows.items():
            tensors[name][(e, *(slice(0, n) for n in own[name].shape))] = own[name].to(device)
    return Branch(kind, tensors, present)


def _as_branch(weights: ScaleWeights | BottleneckWeights) -> tuple[str, dict[str, Tensor]]:
    if isinstance(weights, ScaleWeights):
        return SCALE_IN if weights.on_input else SCALE_OUT, {"scale": weights.scale.float()}
    factor = weights.factor.float()
    own = {"down": weights.down.float(), "down_bias": weights.down_bias.float()}
    own |= {"up": weights.up.float() * factor[:, None], "up_bias": weights.up_bias.float() * factor}
    parts = (BOTTLENECK, weights.activation, *([AFTER] if weights.after_residual else []))
    return "/".join(parts), own


def covered(branches: Branches, num: int) -> Tensor:
    """[E] bool: which experts are of any of these kinds."""
    found = torch.zeros(num, dtype=torch.bool, device="cpu")
    for branch in branches.values():
        found |= branch.present
    return found
