"""vLLM's linear layers: which of them a module of the experts is, what a rank holds of it, and the experts added to it.

A layer computes by `quant_method.apply(layer, x, bias)`, before it gathers or reduces over ranks: the one place where
experts are added, for weights of every format. In a graph of torch.compile that is one opaque op, so that what a step's
requests ask for is seen when the graph runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...routing.shares import Share
from ..branch import Branch
from ..slices import Segment, by_kind, shares

NAMESPACE, OP = "moerge_serving", "linear"
# vLLM's models that put the rows of q, k and v, which transformers has head by head, into another order
BY_KIND = ("BloomForCausalLM", "FalconForCausalLM")
CONTEXT = "moerge."  # before a layer's name in vLLM's table of the layers that a forward may ask for


def segments(layer: nn.Module) -> list[Segment]:
    """The pieces of a parallel layer's output, in the order of the modules that it is made of.

    ValueError for a layer whose pieces are not known.
    """
    from vllm.model_executor.layers import linear

    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, linear.QKVParallelLinear):
        kv = rank // layer.num_kv_head_replicas
        heads = (
            (layer.num_heads, rank, layer.total_num_heads, layer.head_size),
            (layer.num_kv_heads, kv, layer.total_num_kv_heads, layer.head_size),
            (layer.num_kv_heads, kv, layer.total_num_kv_heads, layer.v_head_size),
        )
        found = [Segment(here * width, at * here * width, whole * width) for here, at, whole, width in heads]
    elif isinstance(layer, linear.ColumnParallelLinear):
        whole = getattr(layer, "output_sizes", [layer.output_size])
        found = [Segment(wide // size, rank * (wide // size), wide) for wide in whole]
    else:
        found = [Segment(wide, 0, wide) for wide in getattr(layer, "output_sizes", [layer.output_size])]
    if [segment.size for segment in found] != list(layer.output_partition_sizes):
        held = list(layer.output_partition_sizes)
        raise ValueError(f"{type(layer).__name__} shares its output out as {held}, in a way that is not known")
    return found


def columns(layer: nn.Module) -> tuple[int, int] | None:
    """(start, size) of the input features that a rank has of a layer whose input is shared out; None for whole ones."""
    from vllm.model_executor.layers import linear

    if not isinstance(layer, linear.RowParallelLinear) or layer.tp_size == 1:
        return None
    size = layer.input_size_per_partition
    return layer.tp_rank * size, size


def find(model: nn.Module, sizes: Mapping[str, tuple[int, int]], wanted: list[str]) -> tuple[dict[str, Any], list[str]]:
    """({path of a layer of vLLM's: (layer, {module: Share})}, problems) for the `wanted` modules of the experts.

    sizes: {module: (D, O)} of all linear modules of transformers' model. Modules of another stage of a pipeline are
    left out.
    """
    from vllm.model_executor.models.utils import is_pp_missing_parameter

    layers, problems = dict(model.named_modules()), []
    by_layer: dict[str, dict[str, str]] = {}  # {vLLM's path: {module's name in the layer: module}}
    for module in wanted:
        path, leaf = _path(model, module, layers)
        if path in layers and not is_pp_missing_parameter(path, model):
            by_layer.setdefault(path, {})[leaf] = module
        elif not is_pp_missing_parameter(f"{path}.weight", model):
            problems.append(f"module '{module}': vLLM's {type(model).__name__} has no layer {path!r}")
    found = {}
    for path, modules in by_layer.items():
        try:
            found[path] = (layers[path], _shares(model, path, layers[path], modules, sizes))
        except ValueError as error:
            problems += [f"module '{module}': {error}" for module in modules.values()]
    return found, problems


def _path(model: nn.Module, module: str, layers: Mapping[str, nn.Module]) -> tuple[str, str]:
    """(path of vLLM's layer, the module's own name) of a module of transformers' model."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        renames = mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper
        mapped = renames._map_name(f"{module}.weight")
        module = module if mapped is None else mapped.removesuffix(".weight")
    parent, _, leaf = module.rpartition(".")
    if module not in layers:
        for packed, parts in _packed(model).items():
            if leaf in parts and (not layers or f"{parent}.{packed}" in layers):
                return f"{parent}.{packed}", leaf
    return module, leaf


def _packed(model: nn.Module) -> Mapping[str, list[str]]:
    from vllm.model_executor.utils import get_packed_modules_mapping

    return get_packed_modules_mapping(model)


def _shares(
    model: nn.Module, path: str, layer: nn.Module, modules: Mapping[str, str], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Share]:
    """{module: its share} of the modules with experts in one layer."""
    from vllm.model_executor.layers.linear import LinearBase

    if not isinstance(layer, LinearBase):
        raise ValueError(f"vLLM has it as a {type(layer).__name__}, which is no linear layer to add experts to")
    own = path.rpartition(".")[2]
    parent = next(iter(modules.values())).rpartition(".")[0]
    parts = [own] if own in modules else _packed(model)[own]
    features = {part: sizes[f"{parent}.{part}"] for part in parts if f"{parent}.{part}" in sizes}
    if missing := [part for part in parts if part not in features]:
        raise ValueError(f"vLLM's {own} holds {', '.join(missing)} too, which the model of transformers does not have")
    if wrong := {part: size[0] for part, size in features.items() if size[0] != layer.input_size}:
        raise ValueError(f"vLLM's {own} has D={layer.input_size} input features, the model of transformers {wrong}")
    order = _order(model, layer) if own in modules else None
    whole = shares(segments(layer), {part: size[1] for part, size in features.items()}, columns(layer), order)
    return {module: whole[leaf] for leaf, module in modules.items()}


def _order(model: nn.Module, layer: nn.Module) -> list[tuple[int, int]] | None:
    """In which order vLLM's layer of a single module holds the module's rows; None for the module's own."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    if type(model).__name__ not in BY_KIND or not isinstance(layer, QKVParallelLinear):
        return None
    groups = layer.total_num_kv_heads
    return by_kind(groups, layer.total_num_heads // groups, layer.head_size)


def outside(model: nn.Module) -> set[nn.Module]:
    """The layers of a model that are not of its language model: encoders of images and the like, whose tokens are of no
    request that a step could tell."""
    if not getattr(model, "supports_multimodal", False):
        return set()
    language = set(model.get_language_model().modules())
    return set(model.modules()) - language


class RoutedMethod:
    """`apply` of one layer's quant_method, with experts."""

    def __init__(self, layer: nn.Module, name: str, branches: list[Branch]):
        self.inner, self.branches = layer.quant_method.apply, branches
        self.name, self.key = name, CONTEXT + name
        self.ran = False

    def __call__(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling():
            return _op()(x, bias, sum(layer.output_partition_sizes), self.key)
        return self.compute(layer, x, bias)

    def compute(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.inner(layer, x, bias)
        added, tokens = y, x
        if x.dim() != 2:  # as models of transformers have it, which vLLM runs where it has none of its own
            added, tokens = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        for branch in self.branches:
            branch.add(added, tokens)
        self.ran = True
        return y


def take_place(layer: nn.Module, name: str, branches: list[Branch], context: dict[str, Any]) -> RoutedMethod:
    """Adds `branches` to what `layer` computes. context: vLLM's table of the layers that a forward may ask for."""
    register_op()
    method = RoutedMethod(layer, name, branches)
    held = copy.copy(layer.quant_method)  # another layer may share it
    held.apply = method
    layer.quant_method = held
    context[method.key] = layer
    return method


def register_op() -> None:
    """Defines the opaque op once a process."""
    if hasattr(getattr(torch.ops, NAMESPACE), OP):
        return
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define(f"{OP}(Tensor x, Tensor? bias, int features, str layer) -> Tensor")
    library.impl(OP, _computed, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{OP}", _shaped, lib=library)
    _LIBRARIES.append(library)  # its ops last as long as it does


_LIBRARIES: list[torch.library.Library] = []


def _op() -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), OP).default


def _computed(x: Tensor, bias: Tensor | None, features: int, layer: str) -> Tensor:
    from vllm.forward_context import get_forward_context

    held = get_forward_context().no_compile_layers[layer]
    return held.quant_method.apply.compute(held, x, bias)


def _shaped(x: Tensor, bias: Tensor | None, features: int, layer: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


def routed(model: nn.Module) -> Iterator[RoutedMethod]:
    """Every layer's method that experts were added to."""
    for layer in model.modules():
        method = getattr(getattr(layer, "quant_method", None), "apply", None)
        if isinstance(method, RoutedMethod):
            yield method
