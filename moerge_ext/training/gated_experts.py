"""One expert's LoRA on the stacked parameters of a model's own experts, behind learned gates.

    y_tj = W_j x_tj + s B_j A_j x_tj * sigmoid(v . x_tj)        j: the base expert that token t passes

As `GatedLoRA`, with one gate v for a parameter, whatever the base expert: `patch` routes by it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import ops
from ..experts.bank import ExpertBank, ModuleBank
from ..experts.formats.peft import LoraWeights
from ..routing.fused_experts import Pairs
from ..routing.layers import execution_device
from ..routing.parameter_banks import ParameterBank, Placement, are_turned
from ..routing.routed_linear import BACKENDS


class GatedParameter(nn.Module):
    """The branch of one stacked parameter: lora_A [n,R,D], lora_B [n,O,R] with the scaling folded in, gate [D].

    The gate is a float32 parameter that starts at zero; `gate=False` leaves the sigmoid out (the plain LoRA). A hook
    before the forward sees the gate's input first, then the pairs.
    """

    def __init__(self, bank: ParameterBank, device: torch.device, *, gate: bool = True) -> None:
        super().__init__()
        factors = {"lora_A": bank.lora_A, "lora_B": bank.lora_B, "lora_bias": bank.lora_bias}
        for name, value in factors.items():
            self.register_buffer(name, None if value is None else value[:, 0].to(device), persistent=False)
        self.width = self.lora_A.shape[-1]
        self.gate = nn.Parameter(torch.zeros(self.width, dtype=torch.float32, device=device)) if gate else None
        self.ran = False  # whether a token came through while gradients were on

    def forward(self, scored: Tensor, pairs: Pairs, y: Tensor, x: Tensor) -> Tensor:
        """y [S,O] with the branch of x [S,D]; `scored` is what the gate sees: the tokens [T,D], or x."""
        if torch.is_grad_enabled() and len(x):
            self.ran = True
        with torch.autocast(x.device.type, enabled=False):
            if self.gate is None:
                strength = torch.ones(len(x), 1, device=x.device, dtype=torch.float32)
            else:
                dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
                strength = torch.sigmoid(scored.to(dtype) @ self.gate.to(dtype)).unsqueeze(-1)
                strength = strength if scored is x else strength[pairs.token]
            kernels = BACKENDS["native" if ops.has_kernels(x.device.type) else "reference"]
            slots = pairs.base[:, None].int()
            return kernels.lora_apply(y, x, self.lora_A, self.lora_B, strength, slots, lora_bias=self.lora_bias)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {} if self.gate is None else {"gate": self.gate}


class GatedExperts(nn.ModuleDict):
    """The branches of one experts module, by parameter; see `routing.fused_experts.open_door`."""

    running = True

    def add_branch(self, parameter: str, y: Tensor, x: Tensor, pairs: Pairs, copies: bool) -> Tensor:
        if parameter not in self:
            return y
        return self[parameter](pairs.tokens if copies else x, pairs, y, x)


def gated_experts(model: nn.Module, placement: Placement, *, gate: bool = True) -> dict[str, GatedExperts]:
    """{experts module: its branches}; the factors of `placement` are the LoraWeights of one adapter."""
    made: dict[str, GatedExperts] = {}
    for owner, parameter, pieces in placement.paths():
        module = model.get_submodule(owner)
        turned = are_turned(module, placement.parameters[owner])
        banks = [replace(piece, factors=_bank_of_one(piece.factors)) for piece in pieces]
        bank = ParameterBank(ExpertBank(["adapter"], {}), owner, module, parameter, banks, turned)
        made.setdefault(owner, GatedExperts())[parameter] = GatedParameter(bank, execution_device(module), gate=gate)
    return made


def gated_parameters(branches: dict[str, GatedExperts]) -> dict[str, GatedParameter]:
    """{parameter path: its branch}."""
    return {f"{owner}.{name}": branch for owner, found in branches.items() for name, branch in found.items()}


def _bank_of_one(lora: LoraWeights) -> ModuleBank:
    wide = torch.promote_types(lora.lora_B.dtype, torch.float32)
    bias = None if lora.bias is None else lora.bias.to(wide)[None] * lora.scaling
    return ModuleBank(lora.lora_A.to(wide)[None], lora.lora_B.to(wide)[None] * lora.scaling, bias)
