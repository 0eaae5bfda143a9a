"""What experts say of their base, checked against the model and met: parameters saved beside the LoRA, and the part of
the base that an initialization moved into the factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.claims import BaseClaims, SavedTensor
from ..experts.formats.peft import LoraWeights
from ..experts.module_bank import ModuleBank
from .layers import linear_features

PROGRESS_AFTER = 2.5  # seconds
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def differing(model: nn.Module, claims: BaseClaims) -> tuple[dict[str, SavedTensor], list[str]]:
    """({parameter path: tensor} of the saved parameters that are not the model's, why others cannot be compared).

    Equal is what rounds to the same values in the type of one of the two.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    changed, problems = {}, []
    for path, saved in claims.saved.items():
        ours = tensors.get(path)
        if ours is None:
            problems.append(f"its file holds {path} {list(saved.shape)}, which {type(model).__name__} does not have")
        elif tuple(ours.shape) != saved.shape:
            hint = ": was the vocabulary resized?" if max(len(saved.shape), ours.dim()) == 2 else ""
            problems.append(f"its file holds {path} {list(saved.shape)}, the model's is {list(ours.shape)}{hint}")
        elif why := _unreadable(ours):
            problems.append(f"its file holds {path}, and the model's cannot be compared with it: {why}")
        elif not _equal(saved.read(), ours.detach()):
            changed[path] = saved
    return changed, problems


def saved_problems(model: nn.Module, experts: Mapping[str, BaseClaims]) -> list[str]:
    """Why experts that bring their own parameters of the base cannot be routed on this model."""
    found = []
    for name, claims in experts.items():
        changed, problems = differing(model, claims)
        if changed:
            problems.append(
                f"it was trained with its own {_names(changed)}, saved beside its LoRA and not equal to the model's. "
                f"The LoRA alone: load_experts(..., modules=...). With them: method 'expert:{name}', or load them into "
                "the model first. An embedding or head that was saved and not trained: save the adapter again from the "
                "model it was trained on, with save_embedding_layers=False"
            )
        found += [f"expert {name!r}: {problem}" for problem in problems]
    return found


def own_parameters(
    model: nn.Module, name: str, claims: BaseClaims, routed: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({module path: {parameter: tensor}} that one expert brings, for a model that follows it alone; problems)."""
    changed, problems = differing(model, claims)
    shared = _shared(model)
    found: dict[str, dict[str, Tensor]] = {}
    for path, saved in changed.items():
        module, _, leaf = path.rpartition(".")
        if module in set(routed):
            problems.append(f"it was trained with its own {path}, of a layer that carries its LoRA as well")
        elif path in shared:
            problems.append(f"it was trained with its own {path}, which the model shares with {shared[path]}")
        else:
            found.setdefault(module, {})[leaf] = saved.read()
    return found, [f"expert {name!r}: {problem}" for problem in problems]


def on_base(lora: LoraWeights, layer: nn.Module, init: str) -> LoraWeights:
    """One module of an adapter, as `on_this_base` makes a bank."""
    a, b = taken_out(layer, init, lora.lora_A.shape[0], lora.scaling)
    lora_a, lora_b = (
        part.to(a.device, torch.promote_types(part.dtype, a.dtype)) for part in (lora.lora_A, lora.lora_B)
    )
    return replace(
        lora, lora_A=torch.cat([lora_a, a.to(lora_a)]), lora_B=torch.cat([lora_b, -b.to(lora_b) / lora.scaling], 1)
    )


def init_problems(model: nn.Module, experts: Mapping[str, BaseClaims]) -> list[str]:
    """Why the start of PiSSA and OLoRA experts cannot be computed again from this model's weights."""
    shared, found = _shared(model), []
    for name, claims in experts.items():
        for path, scaling in claims.scalings.items():
            layer = model.get_submodule(path)
            weight = getattr(layer, "weight", None)
            why = "it has no weight" if not isinstance(weight, Tensor) else _unreadable(weight)
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
    return ExpertBank(
        experts.names,
        modules,
        base_model=experts.base_model,
        folders=experts.folders,
        global_vectors=experts.global_vectors,
        global_metadata=experts.global_metadata,
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


def unweighted_targets(model: nn.Module, experts: ExpertBank, claims: Mapping[str, BaseClaims]) -> list[str]:
    """One line for all experts that lack the same layers: those their configs target and their files do not hold."""
    linears = [path for path, layer in model.named_modules() if linear_features(layer) is not None]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, claim in claims.items():
        if claim.targets is not None:
            e = experts.index(name)
            held = {path for path, module in experts.modules.items() if module.present[e]}
            if missing := tuple(path for path in claim.targets.wanted(linears) if path not in held):
                groups.setdefault(missing, []).append(repr(name))
    return [
        f"{_names(paths)}: targeted by the config of {_names(names)}, whose file holds no weights for it; the base "
        "alone computes there"
        for paths, names in groups.items()
    ]


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
    return ModuleBank(
        lora_a, lora_b, bias, present=module.present, ranks=ranks, gates=module.gates, has_gate=module.has_gate
    )


def _unreadable(tensor: Tensor) -> str:
    """Why the values of one of the model's tensors cannot be read, or ""."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"it is a {type(tensor).__name__} (quantized or sharded)"
    if tensor.is_meta:
        return "it is on the meta device (offloaded, or not loaded)"
    return "" if tensor.dtype in _FLOATS or tensor.dim() == 0 else f"it is stored as {tensor.dtype} (quantized)"


def _equal(saved: Tensor, ours: Tensor) -> bool:
    saved = saved.to(ours.device)
    return bool(torch.equal(saved.to(ours.dtype), ours) or torch.equal(saved, ours.to(saved.dtype)))


def _shared(model: nn.Module) -> dict[str, str]:
    """{parameter path: another path of the same tensor}."""
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    return {path: next(o for o in same if o != path) for same in paths.values() if len(same) > 1 for path in same}


def _names(names: Iterable[Any], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
