"""ModuleBank: the experts of one module, stacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .branches import Branches, covered


def kernel_copy(factors: Tensor) -> Tensor:
    """A copy of lora_A [E,R,D] or lora_B [E,O,R] as the CPU kernels read it: the middle axis is the contiguous one."""
    return factors.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def whole_vectors(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """lora_A [E,R,D] and lora_B [E,O,R], R raised by zeros to a multiple of 8: the CUDA kernels read 16 bytes."""
    missing = -lora_A.shape[1] % 8
    if not missing:
        return lora_A, lora_B
    wider = functional.pad(lora_A.mT, (0, missing)), functional.pad(lora_B.mT, (0, 0, 0, missing))
    return wider[0].mT, wider[1].mT


class ModuleBank:
    """The LoRA factors of E experts for one linear layer.

    lora_A [E,R,D]; lora_B [E,O,R], scaling folded in; lora_bias [E,O] or None, scaling folded in. R is the
    largest rank; smaller experts are padded with zeros. Both are stored with the wide axis outside R's, as the CPU
    kernels read them: lora_A as contiguous [E,D,R] and lora_B as contiguous [E,R,O], shown transposed.
    present [E] bool on the CPU: False where an expert has no LoRA here (its rows are zeros); ranks: true rank
    per expert, 0 where absent.
    gates: {kind: [E,D] float32}, as stored, zeros where missing; has_gate: {kind: [E] bool} on the CPU.
    branches: {kind: `Branch`} of the experts that are no LoRA here, whose rank is 0; R is 0 where none is.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        lora_bias: Tensor | None = None,
        *,
        present: Tensor | None = None,
        ranks: Sequence[int] | None = None,
        gates: Mapping[str, Tensor] | None = None,
        has_gate: Mapping[str, Tensor] | None = None,
        branches: Branches | None = None,
    ):
        problems = []
        if lora_A.ndim != 3 or lora_B.ndim != 3:
            problems.append(
                f"lora_A must be [E, R, D] and lora_B [E, O, R], got {list(lora_A.shape)}, {list(lora_B.shape)}"
            )
        elif lora_A.shape[:2] != (lora_B.shape[0], lora_B.shape[2]):
            problems.append(f"lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)} differ in E or R")
        elif lora_bias is not None and tuple(lora_bias.shape) != tuple(lora_B.shape[:2]):
            problems.append(f"lora_bias must be [E, O] = {list(lora_B.shape[:2])}, got {list(lora_bias.shape)}")
        num_experts, rank = lora_A.shape[0], lora_A.shape[1] if lora_A.ndim > 1 else 0
        if present is not None and ranks is not None and not problems:
            known = torch.tensor([r > 0 for r in ranks], dtype=torch.bool, device="cpu") | covered(
                branches or {}, num_experts
            )
            if lost := (present.cpu() & ~known).nonzero().flatten().tolist():
                problems.append(f"experts {lost} are present and have neither a LoRA nor a branch")
        if problems:
            raise ValueError("ModuleBank: " + "; ".join(problems))
        self._lora_A = lora_A.transpose(1, 2).contiguous()
        self._lora_B = lora_B.transpose(1, 2).contiguous()
        self.lora_bias = None if lora_bias is None else lora_bias.contiguous()
        self.present = torch.ones(num_experts, dtype=torch.bool, device="cpu") if present is None else present.cpu()
        self.ranks = (rank,) * num_experts if ranks is None else tuple(ranks)
        self.gates = dict(gates or {})
        self.has_gate = {kind: flags.cpu() for kind, flags in (has_gate or {}).items()}
        self.branches = dict(branches or {})
        for kind in self.gates:
            self.has_gate.setdefault(kind, self.present.clone())

    @property
    def lora_A(self) -> Tensor:
        return self._lora_A.transpose(1, 2)

    @property
    def lora_B(self) -> Tensor:
        return self._lora_B.transpose(1, 2)

    @property
    def num_experts(self) -> int:
        return self._lora_A.shape[0]

    @property
    def rank(self) -> int:
        """R, the padded rank."""
        return self._lora_A.shape[2]

    @property
    def in_features(self) -> int:
        return self._lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self._lora_B.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self._lora_A.dtype

    @property
    def device(self) -> torch.device:
        return self._lora_A.device

    @property
    def nbytes(self) -> int:
        tensors = [self._lora_A, self._lora_B, *self.gates.values(), *self.branches.values()]
        return sum(tensor.nbytes for tensor in tensors) + (self.lora_bias.nbytes if self.lora_bias is not None else 0)

    def __repr__(self) -> str:
        return (
            f"ModuleBank(E={self.num_experts}, R={self.rank}, D={self.in_features}, O={self.out_features}, "
            f"{self.dtype} on {self.device}, present {int(self.present.sum())}, "
            f"bias {self.lora_bias is not None}, gates {sorted(self.gates)})"
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModuleBank:
        """A new bank; LoRA tensors that need no change are shared, gates (always float32) are copied."""
        dtype = dtype or self.dtype
        device = torch.device(device) if device is not None else self.device
        return ModuleBank(
            self._lora_A.to(device, dtype).transpose(1, 2),
            self._lora_B.to(device, dtype).transpose(1, 2),
            None if self.lora_bias is None else self.lora_bias.to(device, dtype),
            present=self.present.clone(),
            ranks=self.ranks,
            gates={kind: gates.to(device, copy=True) for kind, gates in self.gates.items()},
            has_gate={kind: flags.clone() for kind, flags in self.has_gate.items()},
            branches={kind: branch.to(device) for kind, branch in self.branches.items()},
        )

    def set_gate(self, kind: str, expert: int, gate: Tensor) -> None:
        """Write one row of gates[kind]; the kind is added when it is new."""
        self.set_gates(kind, {expert: gate})

    def set_gates(self, kind: str, rows: Mapping[int, Tensor]) -> None:
        """Write several rows of gates[kind], {expert: [D]}, in one copy."""
        if kind not in self.gates:
            self.gates[kind] = torch.zeros(self.num_experts, self.in_features, dtype=torch.float32, device=self.device)
            self.has_gate[kind] = torch.zeros(self.num_experts, dtype=torch.bool, device="cpu")
        experts = torch.tensor(list(rows), device="cpu")
        self.gates[kind][experts.to(self.device)] = torch.stack(list(rows.values())).to(self.device, torch.float32)
        self.has_gate[kind][experts] = True

    def overflows(self, before: ModuleBank) -> list[int]:
        """Ids of experts that are finite in `before` (this bank in another dtype) and not finite here."""
        if self.dtype == before.dtype:
            return []
        bad = before._finite() & ~self._finite()
        return bad.nonzero().flatten().tolist()

    def _finite(self) -> Tensor:
        flags = torch.isfinite(self._lora_A).all(2).all(1) & torch.isfinite(self._lora_B).all(2).all(1)
        if self.lora_bias is not None:
            flags &= torch.isfinite(self.lora_bias).all(1)
        flags = flags.cpu()
        for branch in self.branches.values():
            flags &= branch.finite()
        return flags
