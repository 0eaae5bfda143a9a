"""What experts do to a layer that is no LoRA: the tensors of E experts of one kind, stacked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats.adapter import SCALE_IN, SCALE_OUT, ScaleWeights

KIND_NAMES = {SCALE_IN: "(IA)3", SCALE_OUT: "(IA)3"}
NEUTRAL = {SCALE_IN: 1.0, SCALE_OUT: 1.0}  # what stands in the rows of experts that are not of the kind


@dataclass(frozen=True)
class Branch:
    """One kind of module of E experts at one layer.

    kind, with its tensors:
        scale_in     "scale" [E,D] float32: y = W (scale_e * x) + b           (IA)3 on the input
        scale_out    "scale" [E,O] float32: y = scale_e * (W x + b)           (IA)3 on the output
    present [E] bool on the CPU: which experts are of this kind here; the rows of the others change nothing.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    present: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def to(self, device: torch.device | str | None = None) -> Branch:
        """On another device; the vectors of (IA)3 stay float32, as gates do."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def take(self, experts: Sequence[int]) -> Branch:
        """A copy of the rows of these experts, in this order."""
        rows = list(experts)
        tensors = {name: tensor[rows].clone() for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, present=self.present[rows])

    def works(self) -> Tensor:
        """[E] bool on the CPU: which experts change anything here."""
        return torch.stack([(t != NEUTRAL[self.kind]).flatten(1).any(1) for t in self.tensors.values()]).any(0).cpu()

    def finite(self) -> Tensor:
        """[E] bool on the CPU."""
        return torch.stack([torch.isfinite(t).flatten(1).all(1) for t in self.tensors.values()]).all(0).cpu()


Branches = Mapping[str, Branch]  # by kind
Rows = dict[int, ScaleWeights]  # by expert


def stacked_branches(rows: Rows, num: int, device: torch.device) -> dict[str, Branch]:
    """The branches of `num` experts of which `rows` {expert: weights} are no LoRA."""
    made: dict[str, Branch] = {}
    for e, weights in rows.items():
        kind, own = _as_branch(weights)
        if kind not in made:
            empty = {name: torch.full((num, *t.shape), NEUTRAL[kind], device=device) for name, t in own.items()}
            made[kind] = Branch(kind, empty, torch.zeros(num, dtype=torch.bool))
        made[kind].present[e] = True
        for name, tensor in own.items():
            made[kind].tensors[name][e].copy_(tensor)
    return made


def _as_branch(weights: ScaleWeights) -> tuple[str, dict[str, Tensor]]:
    return SCALE_IN if weights.on_input else SCALE_OUT, {"scale": weights.scale.float()}


def joined(parts: Iterable[tuple[Branches, Sequence[int]]]) -> dict[str, Branch]:
    """One set of branches in which each part gives the rows of the experts that are named beside it."""
    made: dict[str, Branch] = {}
    for branches, experts in parts:
        rows = list(experts)
        for kind, branch in branches.items():
            if not branch.present[rows].any():
                continue
            if kind not in made:
                empty = {name: torch.full_like(t, NEUTRAL[kind]) for name, t in branch.tensors.items()}
                made[kind] = Branch(kind, empty, torch.zeros_like(branch.present))
            made[kind].present[rows] = branch.present[rows]
            for name, tensor in branch.tensors.items():
                made[kind].tensors[name][rows] = tensor[rows]
    return made


def covered(branches: Branches, num: int) -> Tensor:
    """[E] bool: which experts are of any of these kinds."""
    found = torch.zeros(num, dtype=torch.bool)
    for branch in branches.values():
        found |= branch.present
    return found
