"""The factors of one module while the experts are copied in, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .branches import Rows, stacked_branches
from .formats.adapter import LoraWeights, ModuleHeader
from .module_bank import ModuleBank


class Stack:
    """lora_a [E,D,R] and lora_b [E,R,O], as the kernels read them, and bias [E,O] or None.

    held: (expert id, header) of those that have the module.
    """

    def __init__(
        self, held: Sequence[tuple[int, ModuleHeader]], num: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.held, self.num, self.device = held, num, device
        rank = max(module.rank for _, module in held)
        first = held[0][1]
        # without padding every number is written
        new = torch.empty if len(held) == num and all(module.rank == rank for _, module in held) else torch.zeros
        self.lora_a = new(num, first.in_features, rank, dtype=dtype, device=device)
        self.lora_b = new(num, rank, first.out_features, dtype=dtype, device=device)
        self.bias = None
        if any(module.has_bias for _, module in held):
            self.bias = torch.zeros(num, first.out_features, dtype=dtype, device=device)
        self._views = (_bits(self.lora_a), _bits(self.lora_b)) if device.type == "cpu" else None
        self._scalings: dict[int, float] = {}  # of the rows of lora_b that are to be multiplied yet

    def put(self, e: int, weights: LoraWeights) -> None:
        """Copy one expert into row e."""
        rank = weights.lora_A.shape[0]
        if self._views is not None and _alike(weights.lora_A, weights.lora_B, self.lora_a):
            a, b = self._views
            # numpy transposes small matrices in a third of torch's time
            a[e, :, :rank] = _bits(weights.lora_A).T
            b[e, :rank] = _bits(weights.lora_B).T
            self._scalings[e] = weights.scaling
        else:
            self.lora_a[e, :, :rank].copy_(weights.lora_A.t())
            _put_scaled(self.lora_b[e, :rank], weights.lora_B.t(), weights.scaling)
        if weights.bias is not None:
            _put_scaled(self.bias[e], weights.bias, weights.scaling)

    def finish(self) -> set[int]:
        """Fold the scalings in. Ids of experts with NaN or inf anywhere."""
        if len(self._scalings) == self.num and len(set(self._scalings.values())) == 1:
            self.lora_b.mul_(self._scalings[0])
        else:
            for e, scaling in self._scalings.items():
                self.lora_b[e].mul_(scaling)
        found: set[int] = set()
        for tensor in (self.lora_a, self.lora_b, self.bias):
            # a finite sum proves that every term is finite, without a mask as large as the stack
            if tensor is not None and not torch.isfinite(_sum(tensor)):
                flat = tensor.flatten(1)
                found.update(e for e in range(self.num) if not torch.isfinite(flat[e]).all())
        return found

    def overflows(self, e: int) -> list[str]:
        """The parts of expert e that are not finite here."""
        parts = {"lora_A": self.lora_a, "lora_B": self.lora_b, "lora_B.bias": self.bias}
        return [part for part, t in parts.items() if t is not None and not torch.isfinite(t[e]).all()]

    def bank(self, others: Rows) -> ModuleBank:
        """The stack as a bank, with the weights of those experts that are no LoRA here."""
        ranks, present = [0] * self.num, [False] * self.num
        for e, module in self.held:
            ranks[e], present[e] = module.rank, True
        branches = stacked_branches(others, self.num, self.device)
        a, b = self.lora_a.transpose(1, 2), self.lora_b.transpose(1, 2)
        return ModuleBank(a, b, self.bias, present=torch.tensor(present, device="cpu"), ranks=ranks, branches=branches)


def _alike(*tensors: Tensor) -> bool:
    """Whether all are on the CPU and of one dtype."""
    return len({tensor.dtype for tensor in tensors}) == 1 and all(tensor.device.type == "cpu" for tensor in tensors)


def _bits(tensor: Tensor) -> np.ndarray:
    """A view; numpy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _put_scaled(target: Tensor, values: Tensor, scaling: float) -> None:
    """target = scaling * values, formed in float32 (float64 stays float64) and cast once."""
    # torch multiplies 16 bits by a number in float32 and rounds once
    wide = values if values.dtype in (torch.float64, target.dtype) else values.float()
    target.copy_(wide * scaling)


def _sum(tensor: Tensor) -> Tensor:
    # in 16 bits only the result is rounded, which to bfloat16's range makes no difference
    return tensor.sum(dtype=torch.float32 if tensor.dtype == torch.float16 else None)
