"""PiSSA and OLoRA adapters that were not converted, as plain LoRA on the base they took their start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.claims import BaseClaims
from ..experts.formats.peft import LoraWeights
from ..experts.module_bank import ModuleBank
from .layers import shared_parameters, values_problem

PROGRESS_AFTER = 2.5  # seconds


def init_problems(model: nn.Module, experts: Mapping[str, BaseClaims]) -> list[str]:
    """Why the start of PiSSA and OLoRA experts cannot be computed again from this model's weights."""
    shared, found = shared_parameters(model), []
    for name, claims in experts.items():
        for path, scaling in claims.scalings.items():
            layer = model.get_submodule(path)
            weight = getattr(layer, "weight", None)
            why = "it has no weight" if not isinstance(weight, Tensor) else values_problem(weight)
            if not why and f"{path}.weight" in shared:
                why = f"its weight is shared with {shared[f'{path}.weight']}, which the training changed too"
            if not why and scaling <= 0:
                why = f"the scaling is {scaling:g}"
            if why:
                found.append(
                    f"module '{path}': the base weight that {claims.init} of expert {name!r} began with cannot be "
                    f"computed: {why}; convert the adapter (PEFT: save_pretrained with "
                    "path_initial_model_for_weight_conversion)"
                )
    return found


def on_this_base(model: nn.Module, experts: ExpertBank, claims: Mapping[str, BaseClaims]) -> ExpertBank:
    """The bank as plain LoRA on this model: PiSSA and OLoRA experts, those of `claims`, less what they took out of its
    weights.

        W_res x + s B A x  =  W x + (s B A - s B_0 A_0) x,      s B_0 A_0 = what the initialization took out of W

    PiSSA (arXiv 2404.02948) takes the R largest singular parts, OLoRA (arXiv 2406.01775) the first R columns of QR.
    An expert of rank R becomes one of rank 2 R, in float32: two large terms nearly cancel. PEFT rounds W_res to the
    base's type, here W is used as it is.
    """
    starts: dict[str, list[tuple[int, str, float]]] = {}
    for name, claim in claims.items():
        for path, scaling in claim.scalings.items():
            starts.setdefault(path, []).append((experts.index(name), claim.init, scaling))
    if not starts:
        return experts
    modules = dict(experts.modules)
    for path, held in tqdm(starts.items(), "PiSSA and OLoRA on this base", delay=PROGRESS_AFTER, leave=False):
        modules[path] = _less_start(modules[path], model.get_submodule(path), held)
    return experts.with_modules(modules, experts.stored_paths)


def on_base(lora: LoraWeights, layer: nn.Module, init: str) -> LoraWeights:
    """One module of an adapter, as `on_this_base` makes a bank."""
    a, b = taken_out(layer, init, lora.lora_A.shape[0], lora.scaling)
    lora_a, lora_b = (
        part.to(a.device, torch.promote_types(part.dtype, a.dtype)) for part in (lora.lora_A, lora.lora_B)
    )
    return replace(
        lora, lora_A=torch.cat([lora_a, a.to(lora_a)]), lora_B=torch.cat([lora_b, -b.to(lora_b) / lora.scaling], 1)
    )


def taken_out(layer: nn.Module, init: str, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """(A_0 [R,D], B_0 [O,R]) with B_0 A_0 what the initialization took out of the layer's weight."""
    weight = layer.weight.detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    transposed = hasattr(layer, "nx")  # transformers' Conv1D stores [D,O]
    if init == "pissa":
        left, values, right = torch.linalg.svd(weight.T if transposed else weight, full_matrices=False)
        root = values[:rank].sqrt()
        return root[:, None] * right[:rank], left[:, :rank] * root
    # PEFT takes QR of the weight as it is stored
    q, r = torch.linalg.qr(weight)
    a, b = r[:rank], q[:, :rank] * scaling
    return (b.T, a.T) if transposed else (a, b)


def _less_start(module: ModuleBank, layer: nn.Module, held: list[tuple[int, str, float]]) -> ModuleBank:
    found = {e: taken_out(layer, init, module.ranks[e], scaling) for e, init, scaling in held}
    ranks = [rank + (found[e][0].shape[0] if e in found else 0) for e, rank in enumerate(module.ranks)]
    dtype = torch.promote_types(module.dtype, torch.float32)
    wider = max(module.rank, *ranks) - module.rank
    lora_a = nn.functional.pad(module.lora_A.to(dtype), (0, 0, 0, wider))
    lora_b = nn.functional.pad(module.lora_B.to(dtype), (0, wider))
    for e, (a, b) in found.items():
        rows = slice(module.ranks[e], ranks[e])
        lora_a[e, rows] = a.to(lora_a)
        lora_b[e, :, rows] = -b.to(lora_b)
    bias = None if module.lora_bias is None else module.lora_bias.to(dtype)
    kept = {name: getattr(module, name) for name in ("present", "gates", "has_gate", "branches")}
    return ModuleBank(lora_a, lora_b, bias, ranks=ranks, **kept)
