"""Layers that a branch cannot be added to, although they have the sizes of a linear layer; what is wrong, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .. import ops
from .callers import asks_for_peft, home, use_of
from .layers import execution_device, holder, linear_features, on_meta
from .peft_layers import peft_layers, wrapper_problem
from .products import is_product
from .tensor_parallel import is_parallel, model_problems, place_problem, ranks_of

_UNSLOTH = "unsloth"  # its `generate` computes with the layers' weights, also where its `forward` calls the layers


def layer_problems(model: nn.Module, names: Iterable[str], *, by_rank: bool = False) -> list[str]:
    """Why the layers of that name cannot be routed, or not rightly; "module '<name>': ..." each. Unknown names pass.

    by_rank: whether each rank of a tensor parallel model may compute its part (`tensor_parallel.py`).
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    carried = peft_layers(model)
    by_rank = by_rank and is_parallel(model)
    problems = model_problems(model) if by_rank else parallel_problems(model)
    for name in names:
        if name in layers:
            apart = place_problem(model, name) if by_rank else _sharding_problem(layers, name)
            said = [wrapper_problem(model, layers[name], carried.get(name)), apart]
            problems += [f"module '{name}': {text}" for text in said if text is not None]
    return problems + [f"module '{name}': {text}" for name, text in no_effect(model, names).items()]


def no_effect(model: nn.Module, names: Iterable[str], *, inside: bool = True) -> dict[str, str]:
    """{name: why} of the layers on which a branch would have no effect, or could not be computed.

    inside: whether a branch may be added to the product inside of a layer's forward (`products.py`).
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        if name in layers and (why := _caller_problem(layers, name) or _call_problem(layers[name], inside)):
            found[name] = why
    return found


def _caller_problem(layers: dict[str, nn.Module], name: str) -> str | None:
    """Of the module that holds the layer: that it reads the layer's weight instead of calling it."""
    path, leaf = holder(layers, name)
    parent = layers[path]
    kind, cure = type(parent).__name__, "leave it out: load_experts(..., modules=...)"
    use = use_of(parent, leaf)
    fused = asks_for_peft(parent) and not (use is not None and use.called)
    if fused or any(home(module) == _UNSLOTH for module in _above(layers, name)):
        return (
            f"{kind} is replaced by fused kernels (Unsloth's) that read the weight of a layer that is not PEFT's, so "
            "that no expert would take part: load the model with transformers alone"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and _has_fast_path(parent):
        return (
            f"{kind} reads its weight instead of calling it in eval mode (torch's fast path), so that an expert "
            "there has no effect: call torch.backends.mha.set_fastpath_enabled(False) before the patch"
        )
    if use is None or not use.read or use.called or use.handed:
        return None
    return f"{kind} reads its weight and never calls it, so that an expert there has no effect: {cure}"


def _above(layers: dict[str, nn.Module], name: str) -> Iterator[nn.Module]:
    """The modules that hold the layer, the model itself last."""
    while name:
        name = name.rpartition(".")[0]
        yield layers[name]


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether eval mode takes torch's fused kernel, by the conditions of its `forward` that do not change (2.13)."""
    attention = layer.self_attn
    return (
        type(layer).forward is nn.TransformerEncoderLayer.forward
        and torch.backends.mha.get_fastpath_enabled()
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention.num_heads % 2 == 0
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
    )


def _call_problem(layer: nn.Module, inside: bool) -> str | None:
    """Of a subclass of nn.Linear with a forward of its own: that it does not turn [..., D] into [..., O]."""
    if inside and is_product(layer):
        return None
    own = isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward and "forward" not in vars(layer)
    weight = layer._parameters.get("weight") if own else None
    if type(weight) is not nn.Parameter or list(weight.shape) != list(linear_features(layer)[::-1]):
        return None  # not its own forward, or a quantized weight, which is computed with in its own way
    said = None
    for leading in ((2,), (1, 2)):
        try:
            y = _shape_run(layer, (*leading, weight.shape[1]))
        except (NotImplementedError, TypeError, AttributeError):
            return None  # no kernel for shapes alone, or more arguments: nothing is known
        except RuntimeError as error:
            if "device meta" in str(error):
                return None  # a tensor of its own that no module holds: nothing is known
            said = said or f"a forward of its own that fails ({str(error).partition(chr(10))[0]})"
            continue
        if isinstance(y, Tensor) and list(y.shape) == [*leading, weight.shape[0]]:
            return None
        came = f"{list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        said = f"a forward of its own that turns {[*leading, weight.shape[1]]} into {came}"
    return (
        f"{type(layer).__name__} has {said}, where a linear layer gives [..., {weight.shape[0]}]: leave it out of the "
        "experts by load_experts(..., modules=...) (all-linear takes such layers of routers along)"
    )


@torch.no_grad()
def _shape_run(layer: nn.Module, shape: tuple[int, ...]) -> object:
    """What the layer returns for an input on the meta device: shapes, and no arithmetic."""
    return type(layer).forward(on_meta(layer), torch.empty(shape, device="meta", dtype=layer.weight.dtype))


def parallel_problems(model: nn.Module) -> list[str]:
    """Of a model that transformers has split over processes by features."""
    if not is_parallel(model):
        return []
    return [
        f"the model is tensor parallel (tp_size={ranks_of(model)}): each process has a part of every layer's features, "
        "of which all are needed here. Load it without tp_size, or share it out by FSDP2 (fully_shard) or device_map"
    ]


def _sharding_problem(layers: dict[str, nn.Module], name: str) -> str | None:
    """Of a layer whose weight is a DTensor that FSDP2 does not put together before the layer runs."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    weight = getattr(layers[name], "weight", None)
    if not isinstance(weight, DTensor):
        return None
    gathered = any(isinstance(module, FSDPModule) for module in (layers[name], *_above(layers, name)))
    axes = weight.device_mesh.mesh_dim_names or ()
    if gathered and "tp" not in axes:
        return None
    return (
        f"its weight is a DTensor, {', '.join(map(str, weight.placements))} over {weight.device_mesh.size()} "
        "processes (tensor parallel), and a router needs all features: share the model out by FSDP2 (fully_shard)"
    )


def device_problems(model: nn.Module, patched: Iterable[str], backend: str) -> list[str]:
    """Why the layers of these paths cannot be computed where they are."""
    devices = {execution_device(model.get_submodule(name)).type for name in patched}
    problems = []
    if "meta" in devices:
        problems.append("the model's weights are on the meta device: load them before the patch")
    if backend == "native":
        problems += [
            f"this build has no kernels for '{device}'; move the model to the CPU or pass backend=\"reference\""
            for device in sorted(devices - {"meta"})
            if not ops.has_kernels(device)
        ]
    return problems
