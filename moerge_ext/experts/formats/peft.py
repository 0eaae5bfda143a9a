"""Readers of adapter formats. Today: PEFT LoRA folders, with the gates sidecar of this project beside them.

A folder is untrusted. `inspect_adapter` reads the config and the headers only and lists every reason to
refuse; tensors are read afterwards, straight from the mapped file. No code, module name or model is loaded
because an adapter names it.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.safefile import (
    FLOATS,
    AdapterError,
    TensorHeader,
    file_inside,
    open_tensors,
    path_problem,
    read_headers,
    read_tensor,
)
from ..gates import GATES_FILE, GLOBAL_KEY, GateSet, read_gates, write_gates
from .peft_config import LoraRules, check_config, read_config

__all__ = [
    "GATES_FILE",
    "GLOBAL_KEY",
    "Adapter",
    "AdapterError",
    "AdapterHeader",
    "GateSet",
    "LoraWeights",
    "ModuleHeader",
    "inspect_adapter",
    "read_adapter",
    "read_gates",
    "write_gates",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
MAX_SCANNED, MAX_NAMED = 1000, 10  # entries of a folder without a config, and adapters below it to name
_UNREADABLE = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class LoraWeights:
    """One module of one adapter: y += scaling * (lora_B lora_A x + bias). All tensors as stored, unscaled."""

    lora_A: Tensor  # [R,D]
    lora_B: Tensor  # [O,R]
    scaling: float
    bias: Tensor | None = None  # [O]


@dataclass(frozen=True)
class Adapter:
    """A checked adapter with its tensors in memory."""

    name: str
    folder: Path
    base_model: str | None
    config: dict[str, Any]
    modules: dict[str, LoraWeights]
    gates: dict[str, GateSet] = field(default_factory=dict)


@dataclass(frozen=True)
class ModuleHeader:
    """Sizes and scaling of one module of one adapter."""

    in_features: int  # D
    out_features: int  # O
    rank: int  # R
    scaling: float
    dtype: torch.dtype
    has_bias: bool
    nbytes: int


@dataclass(frozen=True)
class AdapterHeader:
    """A checked adapter whose tensors are still in its file; `read` yields them one module at a time."""

    name: str
    folder: Path
    base_model: str | None
    config: dict[str, Any]
    modules: dict[str, ModuleHeader]
    gates: dict[str, GateSet]
    headers: dict[str, TensorHeader] = field(repr=False)
    notes: list[str] = field(default_factory=list)  # what is odd about it and no reason to refuse

    def read(self) -> Iterator[tuple[str, LoraWeights]]:
        """(module path, weights) of every module. The tensors may alias the mapped file: copy what you
        keep.
        """
        with open_tensors(file_inside(self.folder, WEIGHTS_FILE)) as handle:
            for path, module in self.modules.items():
                parts = {}
                for suffix, part in _SUFFIXES.items():
                    if part != "bias" or module.has_bias:
                        key = PREFIX + path + suffix
                        parts[part] = read_tensor(handle, key, self.headers[key])
                yield path, LoraWeights(parts["A"], parts["B"], module.scaling, parts.get("bias"))


def read_adapter(name: str, folder: str | os.PathLike) -> Adapter:
    """Read a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors`, gates) into memory.

    Tensors keep their stored dtype and are unscaled. Raises AdapterError with every problem found; warns of
    what the config says of modules that are not in the file.
    """
    header = inspect_adapter(name, folder)
    for note in header.notes:
        warnings.warn(f"adapter {name!r} in {header.folder}: {note}", stacklevel=2)
    modules, problems = {}, []
    try:
        for path, weights in header.read():
            parts = [weights.lora_A, weights.lora_B, weights.bias]
            parts = [None if part is None else part.clone() for part in parts]
            problems += nonfinite_problems(path, *parts)
            modules[path] = LoraWeights(parts[0], parts[1], weights.scaling, parts[2])
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise AdapterError(problems, _heading(name, header.folder))
    return Adapter(name, header.folder, header.base_model, header.config, modules, header.gates)


def nonfinite_problems(path: str, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> list[str]:
    parts = {"lora_A": lora_A, "lora_B": lora_B, "lora_B.bias": bias}
    return [
        f"{path}: {part} holds NaN or infinite values"
        for part, tensor in parts.items()
        if tensor is not None and not torch.isfinite(tensor).all()
    ]


def inspect_adapter(name: str, folder: str | os.PathLike) -> AdapterHeader:
    """Check a PEFT LoRA folder without reading its tensors.

    Raises AdapterError with every problem of the config, of the tensors' names, shapes and dtypes, of their
    agreement with the config, and of the gates. The config must agree with the file both ways where it can be
    known without the base model: no weights for a module that `target_modules` (a list, or a regular
    expression of `patterns`' syntax), `exclude_modules` or `layers_to_transform` leave out; a listed target or
    a pattern without any module in the file is noted.
    """
    folder = Path(folder)
    try:
        folder = folder.resolve(strict=True)
        if not folder.is_dir():
            raise ValueError("it is not a folder; expected a folder with " + CONFIG_FILE)
    except (OSError, RuntimeError) as error:
        raise AdapterError(["there is no such folder"], _heading(name, folder)) from error
    except ValueError as error:  # also a null byte in the path
        raise AdapterError([str(error)], _heading(name, folder)) from None

    problems: list[str] = []
    config, rules = _read_rules(folder, problems)
    headers, parts = _read_parts(folder, problems)
    modules = _check_modules(parts, rules, problems)
    # gates are matched against modules only when the modules could be understood
    widths = {path: module.in_features for path, module in modules.items()}
    gates: dict[str, GateSet] = {}
    try:
        gates = read_gates(folder, None if problems else widths)
    except AdapterError as error:
        problems += error.problems
    if problems:
        raise AdapterError(problems, _heading(name, folder))
    return AdapterHeader(name, folder, rules.base_model, config, modules, gates, headers, rules.notes(modules))


def _heading(name: str, folder: Path) -> str:
    return f"adapter {name!r} in {folder} cannot be used"


def _read_rules(folder: Path, problems: list[str]) -> tuple[dict[str, Any], LoraRules | None]:
    try:
        config = read_config(file_inside(folder, CONFIG_FILE))
    except (ValueError, OSError) as error:
        problems.append(str(error) + _adapters_below(folder))
        return {}, None
    rules, reasons = check_config(config)
    problems += reasons
    return config, rules


def _adapters_below(folder: Path) -> str:
    """A hint when a folder without a config is the parent of adapters."""
    if os.path.lexists(folder / CONFIG_FILE):
        return ""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                entry.name
                for entry in itertools.islice(entries, MAX_SCANNED)
                if os.path.lexists(os.path.join(entry.path, CONFIG_FILE))
            )
    except OSError:  # a hint is not worth an error of its own
        return ""
    if not found:
        return ""
    more = f", and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return f"; it has adapters in: {', '.join(found[:MAX_NAMED])}{more}. Pass these folders"


def _read_parts(
    folder: Path, problems: list[str]
) -> tuple[dict[str, TensorHeader], dict[str, dict[str, TensorHeader]]]:
    """(headers by key, {module path: {"A" | "B" | "bias": header}}) from the weights file."""
    try:
        with open_tensors(file_inside(folder, WEIGHTS_FILE)) as handle:
            headers = read_headers(handle)
    except (ValueError, OSError) as error:
        pickles = [name for name in _UNREADABLE if (folder / name).exists()]
        hint = f"; {pickles[0]} is a pickle and is never read: convert it to {WEIGHTS_FILE}" if pickles else ""
        problems.append(str(error) + hint)
        return {}, {}
    if not headers:
        problems.append(f"{WEIGHTS_FILE} holds no tensor")
    parts: dict[str, dict[str, TensorHeader]] = {}
    for key, header in headers.items():
        part = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        path = key[len(PREFIX) : -len(part)] if part else ""
        if part is None or not key.startswith(PREFIX):
            problems.append(_unknown_key(key))
        elif why := path_problem(path):
            problems.append(why)
        else:
            parts.setdefault(path, {})[_SUFFIXES[part]] = header
    return headers, parts


def _unknown_key(key: str) -> str:
    shown = repr(key if len(key) <= 200 else key[:200] + "...")
    if "lora_magnitude_vector" in key:
        return f"{shown} belongs to DoRA, which is not supported"
    if "lora_embedding_" in key:
        return f"{shown} is LoRA on an embedding, which is not a linear layer"
    if ".lora_A." in key or ".lora_B." in key:
        return f"{shown} is not named {PREFIX}<module>.lora_A.weight, .lora_B.weight or .lora_B.bias"
    return (
        f"{shown} is not a LoRA weight (whole modules, embeddings or biases saved with an "
        f"adapter replace parts of "
        "the base model)"
    )


def _check_modules(
    parts: Mapping[str, Mapping[str, TensorHeader]], rules: LoraRules | None, problems: list[str]
) -> dict[str, ModuleHeader]:
    modules: dict[str, ModuleHeader] = {}
    if rules is not None and (reasons := rules.work_problems(parts)):
        problems += reasons
        rules = None
    left_out = rules.left_out(parts) if rules is not None else {}
    for path, found in parts.items():
        reasons = _shape_problems(path, found)
        if not reasons and rules is not None:
            reasons = _disagreements(path, found, rules)
        if path in left_out:
            reasons.append(f"{path}: the file has weights for it, {left_out[path]}")
        problems += reasons
        if not reasons:
            rank, in_features = found["A"].shape
            modules[path] = ModuleHeader(
                in_features=in_features,
                out_features=found["B"].shape[0],
                rank=rank,
                scaling=rules.scaling_of(path, rank) if rules is not None else 1.0,
                dtype=common_dtype(FLOATS[part.dtype] for part in found.values()),
                has_bias="bias" in found,
                nbytes=sum(part.nbytes for part in found.values()),
            )
    return modules


def common_dtype(dtypes) -> torch.dtype:
    """The smallest dtype that holds all of them (float16 with bfloat16 gives float32)."""
    dtypes = list(dtypes)
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    return common


def _shape_problems(path: str, found: Mapping[str, TensorHeader]) -> list[str]:
    problems = []
    for part, label in (("A", "lora_A"), ("B", "lora_B")):
        if part not in found:
            problems.append(f"{path}: {label}.weight is missing")
    for part, header in found.items():
        label, dims, want = {
            "A": ("lora_A", 2, "[R, D]"),
            "B": ("lora_B", 2, "[O, R]"),
            "bias": ("lora_B.bias", 1, "[O]"),
        }[part]
        if header.dtype not in FLOATS:
            problems.append(f"{path}: {label} must be one of {', '.join(FLOATS)}, got {header.dtype}")
        if len(header.shape) != dims:
            hint = " (LoRA of a convolution or of an old fused layout)" if len(header.shape) > 2 else ""
            problems.append(f"{path}: {label} must be {want}, got {list(header.shape)}{hint}")
        elif 0 in header.shape:
            problems.append(f"{path}: {label} has no elements, shape {list(header.shape)}")
    if problems:
        return problems
    lora_a, lora_b = found["A"].shape, found["B"].shape
    if lora_a[0] != lora_b[1]:
        problems.append(f"{path}: ranks disagree, lora_A {list(lora_a)} [R, D] and lora_B {list(lora_b)} [O, R]")
    if "bias" in found and found["bias"].shape[0] != lora_b[0]:
        problems.append(f"{path}: lora_B.bias must be [O={lora_b[0]}], got {list(found['bias'].shape)}")
    return problems


def _disagreements(path: str, found: Mapping[str, TensorHeader], rules: LoraRules) -> list[str]:
    """Where the config and the tensors of a module contradict each other."""
    problems = []
    rank, source = rules.rank_of(path)
    if found["A"].shape[0] != rank:
        problems.append(f"{path}: the config says rank {rank} ({source}), the tensors have {found['A'].shape[0]}")
    if rules.lora_bias != ("bias" in found):
        problems.append(
            f"{path}: the config says lora_bias {str(rules.lora_bias).lower()}, the file "
            f"{'holds' if 'bias' in found else 'lacks'} lora_B.bias"
        )
    return problems
