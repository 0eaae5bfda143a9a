"""Layers that transformers has shared out over ranks by their features (`DistributedConfig(tp_size=...)`).

transformers leaves a layer what it was, an nn.Linear of all its features, with a weight of which a rank holds a part
(a DTensor) and a `forward` of its own. What goes in and comes out follows from its style in the model's plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .shares import Share

# whose input and output have all features on every rank, however the weight lies
WHOLE = (
    None,
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_rep",
    "rowwise_split_input",
    "replicate",
    "replicated_with_grad_allreduce",
)
OUTPUT, INPUT = "colwise", "rowwise"  # a rank has a part of the output features, or of the input features
OTHERS = {
    "fsdp_size": "FSDP",
    "dp_replicate_size": "replicas",
    "pp_size": "a pipeline",
    "ep_size": "expert parallelism",
}


@dataclass(frozen=True)
class Place:
    """Where one rank stands in one layer. group: the ranks that share it; first: whether it is the first of them."""

    share: Share
    group: Any
    first: bool


def ranks_of(model: nn.Module) -> int:
    """Over how many ranks the features of the model's layers are shared out; 1 where they are not."""
    sizes = [size for module in model.modules() if isinstance(size := getattr(module, "_tp_size", None), int)]
    return max(sizes, default=1)


def is_parallel(model: nn.Module) -> bool:
    """Whether transformers has shared the model's layers out by features."""
    return ranks_of(model) > 1


def model_problems(model: nn.Module) -> list[str]:
    """Why a tensor parallel model cannot be routed at all."""
    if mesh_group(model) is None:
        return [
            f"the model is tensor parallel (tp_size={ranks_of(model)}) and has no device mesh: load it by "
            "from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))"
        ]
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    beside = [what for key, what in OTHERS.items() if (getattr(config, key, None) or 1) > 1]
    if beside:
        return [f"the model is tensor parallel, and by {', '.join(beside)} too, which experts cannot be: tp_size alone"]
    return []


def mesh_group(model: nn.Module) -> Any:
    """The ranks that share the model's layers; None where transformers did not make them."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or not torch.distributed.is_initialized():
        return None
    return mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")


def style_of(model: nn.Module, path: str) -> str | None:
    """How a layer is shared out by the model's plan; None for one that is not."""
    plan = getattr(model, "tp_plan", None) or {}
    return plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))


def place_of(model: nn.Module, path: str) -> Place | None:
    """The part of the layer at `path` of a parallel model that this rank has; None where it has all.

    For layers of no `place_problem`.
    """
    style = style_of(model, path)
    if style in WHOLE:
        return None
    weight = model.get_submodule(path).weight
    mesh = weight.device_mesh
    features, wide = weight.shape
    part = _part(features if style == OUTPUT else wide, mesh.size(), mesh.get_local_rank())
    rows, columns = (part, None) if style == OUTPUT else ((0, features), part)
    return Place(Share(0, rows[1], (rows,), columns), mesh.get_group(), mesh.get_local_rank() == 0)


def place_problem(model: nn.Module, path: str) -> str | None:
    """Why the experts of the layer at `path` cannot be shared out as it is."""
    from torch.distributed.tensor import DTensor, Shard

    layer, style = model.get_submodule(path), style_of(model, path)
    weight = getattr(layer, "weight", None)
    if style in WHOLE:
        known = style is not None or not isinstance(weight, DTensor)
        return None if known else "its weight is a DTensor, and the model's tp_plan does not say of which features"
    if style not in (OUTPUT, INPUT):
        return f"it is shared out over ranks as {style!r}, and experts are known for {OUTPUT} and {INPUT} alone"
    axis = 0 if style == OUTPUT else 1
    if not isinstance(layer, nn.Linear) or not isinstance(weight, DTensor):
        return f"it is shared out over ranks as {style!r}, and is a {type(layer).__name__} of {type(weight).__name__}"
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(axis),):
        found = ", ".join(map(str, weight.placements))
        return f"it is shared out over ranks as {style!r}, and its weight lies as {found}"
    ranks, whole = weight.device_mesh.size(), weight.shape[axis]
    if -(-whole // ranks) * (ranks - 1) >= whole:
        return f"its {whole} features leave one of {ranks} ranks without any"
    if weight.to_local().shape[axis] != _part(whole, ranks, weight.device_mesh.get_local_rank())[1]:
        return f"its {whole} features are shared out over {ranks} ranks in a way that is not known"
    return None


def _part(whole: int, ranks: int, rank: int) -> tuple[int, int]:
    """(start, size) of a rank's part, as `torch.chunk` makes it: the last may be smaller."""
    size = -(-whole // ranks)
    return rank * size, max(0, min(size, whole - rank * size))


def sum_over(group: Any) -> Any:
    """What adds a tensor up over the ranks of a group, in place."""

    def reduce(part: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(part, group=group)
        return part

    return reduce
