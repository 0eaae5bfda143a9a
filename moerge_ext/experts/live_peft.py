"""LoRA adapters of a live PEFT model, under the same rules as a folder. The model is read, never changed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files.safefile import FLOATS, AdapterError, path_problem, widened
from .claims import BaseClaims, SavedTensor
from .formats.peft import GateSet, LoraWeights, ModuleHeader, common_dtype
from .formats.peft_config import check_config, of_modules
from .formats.peft_keys import OTHERS
from .formats.peft_parameters import StackedLora
from .formats.peft_rules import LoraRules, some_of
from .keys import bare_path, module_of
from .selection import Selection


@dataclass(frozen=True)
class LiveAdapter:
    """The same face as `AdapterHeader`, over the layers of a model."""

    name: str
    base_model: str | None
    config: dict[str, Any]
    modules: dict[str, ModuleHeader]
    layers: dict[str, nn.Module] = field(repr=False)
    gates: dict[str, GateSet] = field(default_factory=dict)
    folder: Path | None = None
    notes: list[str] = field(default_factory=list)
    claims: BaseClaims = field(default_factory=BaseClaims)

    def read(self) -> Iterator[tuple[str, LoraWeights]]:
        """(module path, weights) of every module; the tensors are the model's own: copy, never write."""
        for path, module in self.modules.items():
            a, b, bias = (None if t is None else t.detach() for t in _tensors(self.layers[path], self.name))
            if module.slice is not None:
                a, b = module.slice.of("A", a), module.slice.of("B", b)
            yield path, LoraWeights(a, b, module.scaling, bias)


def is_peft_model(source: Any) -> bool:
    """Whether `source` is a model with PEFT adapters (a PeftModel, or a transformers model with adapters
    added).
    """
    return isinstance(source, nn.Module) and isinstance(getattr(source, "peft_config", None), dict)


def live_adapters(model: nn.Module, selection: Selection) -> tuple[list[LiveAdapter], dict[str, list[str]]]:
    """(the adapters that can be experts, {adapter name: problems} of the others), of those that are selected."""
    layers = {
        path: module
        for path, module in ((bare_path(name), module) for name, module in model.named_modules())
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "lora_A")
        if selection.keeps is None or any(map(selection.keeps, _paths(path, module)))
    }
    found, bad = [], {}
    for name in selection.choose(list(model.peft_config)):
        try:
            adapter = _live_adapter(name, model.peft_config[name], layers, model, selection.keeps)
            if selection.keeps is not None:
                kept = {
                    path: tensor for path, tensor in adapter.claims.saved.items() if selection.keeps(module_of(path))
                }
                adapter = replace(adapter, claims=BaseClaims(kept))
            if selection.names is None and (role := _role(name)):
                adapter.notes.append(f"{role}: choose the experts with names=[...] if it is none")
            found.append(adapter)
        except AdapterError as error:
            bad[repr(name)] = error.problems
    return found, bad


def _role(name: str) -> str:
    """What libraries keep under this name beside the adapters that are experts."""
    if name == "ref":
        return "TRL keeps its frozen reference policy under this name"
    if re.fullmatch(r"gks_\d+", name):
        return "PEFT's Arrow keeps a general-knowledge adapter, which it subtracts from the others, under this name"
    return ""


def _live_adapter(
    name: str,
    config: Any,
    layers: dict[str, nn.Module],
    model: nn.Module,
    keep: Callable[[str], bool] | None,
) -> LiveAdapter:
    values = _plain(config.to_dict())
    rules, problems = check_config(values if _trains_tokens(model, name, keep) else of_modules(values, keep))
    modules: dict[str, ModuleHeader] = {}
    held: dict[str, nn.Module] = {}
    for path, layer in layers.items():
        if name not in layer.lora_A and name not in getattr(layer, "lora_embedding_A", {}):
            continue
        reasons = _layer_problems(path, layer, name)
        problems += reasons
        if not reasons:
            found = _module_headers(path, layer, name, keep)
            modules |= found
            held |= dict.fromkeys(found, layer)
    if rules is not None:
        problems += _base_problems(rules, values.get("bias"), model, held, modules)
    if not modules and not problems:
        problems.append("no layer of the model carries this adapter, or none that modules=... takes")
    if problems:
        raise AdapterError(problems)
    claims = BaseClaims(_saved_modules(model, name))
    return LiveAdapter(name, rules.base_model, values, modules, held, claims=claims)


def _trains_tokens(model: nn.Module, name: str, keep: Callable[[str], bool] | None) -> bool:
    """Whether a module that is taken has rows of its own for some tokens."""
    return any(
        name in module.trainable_tokens_delta and (keep is None or keep(bare_path(path)))
        for path, module in model.named_modules()
        if hasattr(module, "trainable_tokens_delta")
    )


def _base_problems(
    rules: LoraRules, bias: Any, model: nn.Module, layers: dict[str, nn.Module], modules: dict[str, ModuleHeader]
) -> list[str]:
    """What the training of this adapter changed in the base that the model now holds."""
    problems = []
    if rules.init is not None:
        problems.append(
            f"init_lora_weights = {rules.init!r} changed the base weights of this model; save the adapter and pass its "
            "folder with the base as it was, or convert it (PEFT: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if bias == "lora_only":
        trained = [path for path in modules if getattr(layers[path].get_base_layer(), "bias", None) is not None]
    elif bias == "all":
        trained = [path for path, _ in model.named_parameters() if path.endswith(".bias") and "lora_" not in path]
    else:
        trained = []
    if trained:
        problems.append(f"bias = {bias!r} trained biases of the base: {some_of(trained)}")
    return problems


def _saved_modules(model: nn.Module, name: str) -> dict[str, SavedTensor]:
    """{parameter path: tensor} of the whole modules that this adapter brings, PEFT's `modules_to_save`."""
    saved = {}
    for path, wrapper in model.named_modules():
        copies = getattr(wrapper, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and name in copies:
            for key, tensor in copies[name].state_dict().items():
                full = f"{bare_path(path)}.{key}"
                saved[full] = SavedTensor(tuple(tensor.shape), full, tensor=tensor.detach())
    return saved


def _plain(value: Any) -> Any:
    """A config as JSON would show it: enums as their values, sets and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(entry) for entry in value]
    return getattr(value, "value", value)


def _layer_problems(path: str, layer: nn.Module, name: str) -> list[str]:
    if why := path_problem(path):
        return [why]
    if name not in layer.lora_A:
        return [f"{path}: LoRA on an embedding, which is not a linear layer; {OTHERS}"]
    if isinstance(getattr(layer, "base_layer", None), nn.MultiheadAttention):
        return [f"{path}: LoRA on nn.MultiheadAttention, which is not a linear layer"]
    problems = []
    if getattr(layer, "merged_adapters", None):
        problems.append(f"{path}: adapters are merged into the base weight; call unmerge_adapter() first")
    a, b, bias = _tensors(layer, name)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
        return [f"{path}: expected lora_A [R, D] and lora_B [O, R], got {list(a.shape)} and {list(b.shape)}"]
    for part in (a, b) if bias is None else (a, b, bias):
        if part.is_meta:
            problems.append(f"{path}: its weights are on the meta device (offloaded); move the model first")
        elif part.dtype not in FLOATS.values():
            problems.append(f"{path}: LoRA weights must be floats, got {part.dtype}")
    if not math.isfinite(layer.scaling[name]):
        problems.append(f"{path}: scaling is {layer.scaling[name]}")
    return problems


def _tensors(layer: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    lora_b = layer.lora_B[name]
    bias = getattr(lora_b, "bias", None)
    return widened(layer.lora_A[name].weight), widened(lora_b.weight), None if bias is None else widened(bias)


def _module_headers(
    path: str, layer: nn.Module, name: str, keep: Callable[[str], bool] | None
) -> dict[str, ModuleHeader]:
    """{module path: header}: one for a layer, one per base expert for PEFT's wrapper of a stacked parameter."""
    header = _module_header(layer, name)
    if not hasattr(layer, "parameter_name"):
        return {path: header}
    lora = _stacked(path, layer, header.rank // layer.num_experts, keep)
    header = replace(header, rank=lora.rank, nbytes=header.nbytes // lora.count)
    return {path: replace(header, slice=part) for path, part in lora.modules().items()}


def _paths(path: str, layer: nn.Module) -> Iterable[str]:
    """The paths of the modules that a layer holds."""
    return _stacked(path, layer).all_modules() if hasattr(layer, "parameter_name") else (path,)


def _stacked(path: str, layer: nn.Module, rank: int = 1, keep: Callable[[str], bool] | None = None) -> StackedLora:
    """What PEFT's wrapper at `path` has of its parameter."""
    parameter = f"{path.replace('.base_layer', '')}.{layer.parameter_name}"
    return StackedLora(path, parameter, layer.num_experts, rank, keep)


def _module_header(layer: nn.Module, name: str) -> ModuleHeader:
    parts = [part for part in _tensors(layer, name) if part is not None]
    header = ModuleHeader(
        in_features=parts[0].shape[1],
        out_features=parts[1].shape[0],
        rank=parts[0].shape[0],
        scaling=float(layer.scaling[name]),
        dtype=common_dtype(part.dtype for part in parts),
        has_bias=len(parts) == 3,
        nbytes=0,
    )
    return replace(header, nbytes=sum(part.nbytes for part in parts))
