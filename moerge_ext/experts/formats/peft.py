"""PEFT LoRA folders, and the checks of what any format's reader makes of an adapter (`view.py`).

A folder is untrusted. `inspect_adapter` reads the config and the headers only and lists every reason to
refuse; tensors are read afterwards, one by one. No code, module name or model is loaded
because an adapter names it.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from ...files.counting import counted
from ...files.safefile import FLOATS, AdapterError, TensorHeader, file_inside
from ...files.shards import has_weights, open_weights
from ..claims import BaseClaims, SavedTensor
from ..gates import GATES_FILE, GLOBAL_KEY, GateSet, read_gates, write_gates
from . import adalora
from .adapter import Adapter, AdapterHeader, LoraWeights, ModuleHeader, ModuleWeights, common_dtype
from .foreign import trained_beside, what_else
from .peft_config import check_config, of_modules, read_config, refused_fields
from .peft_keys import SortedKeys, sort_keys
from .peft_parameters import StackedLora, find_stacked, stacked_notes, take_stacked
from .peft_rules import Alpha, LoraRules, show
from .peft_shapes import shape_problems
from .view import AdapterView, OpenTensors

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
MAX_SCANNED, MAX_NAMED = 1000, 10  # entries of a folder without a config, and adapters below it to name


def read_adapter(name: str, folder: str | os.PathLike) -> Adapter:
    """`into_memory` of a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors`, gates)."""
    return into_memory(inspect_adapter(name, folder))


def into_memory(header: AdapterHeader) -> Adapter:
    """Read the tensors of a checked adapter.

    They keep their stored dtype and are unscaled. Raises AdapterError with every problem found; warns of
    what the config says of modules that are not in the file.
    """
    for note in header.notes:
        warnings.warn(f"adapter {header.name!r} in {header.folder}: {note}", stacklevel=3)
    modules, problems = {}, []
    try:
        for path, weights in header.read():
            modules[path] = weights.copy()
            problems += nonfinite_problems(path, modules[path])
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise AdapterError(problems, heading(header.name, header.folder))
    return Adapter(header.name, header.folder, header.base_model, header.config, modules, header.gates, header.claims)


def nonfinite_problems(path: str, weights: ModuleWeights) -> list[str]:
    return [
        f"{path}: {part} holds NaN or infinite values"
        for part, tensor in weights.parts().items()
        if not torch.isfinite(tensor).all()
    ]


def inspect_adapter(name: str, folder: str | os.PathLike, keep: Callable[[str], bool] | None = None) -> AdapterHeader:
    """Check a PEFT LoRA folder without reading its tensors; `keep` says which module paths to look at (None: all).

    Raises AdapterError with every problem of the config, of the tensors' names, shapes and dtypes, of their
    agreement with the config, and of the gates. The config must agree with the file both ways where it can be
    known without the base model: no weights for a module that `target_modules` (a list, or a regular
    expression of `patterns`' syntax), `exclude_modules` or `layers_to_transform` leave out; a listed target or
    a pattern without any module in the file is noted.
    """
    resolved = resolve(name, folder)
    if not resolved.is_dir():
        raise AdapterError([f"it is not a folder; expected a folder with {CONFIG_FILE}"], heading(name, resolved))
    return inspect_view(name, resolved, resolved, view_peft(resolved), keep)


def resolve(name: str, path: str | os.PathLike) -> Path:
    """The path without links; AdapterError when there is nothing."""
    path = Path(path)
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise AdapterError(["there is no such folder"], heading(name, path)) from error
    except ValueError as error:  # a null byte in the path
        raise AdapterError([str(error)], heading(name, path)) from None


def view_peft(folder: Path, opener: Callable[[], AbstractContextManager[OpenTensors]] | None = None) -> AdapterView:
    """A resolved PEFT folder, as it is; `opener` opens tensors that are not in the usual file."""
    config, problems = None, []
    there = os.path.lexists(folder / CONFIG_FILE), opener is not None or has_weights(folder, WEIGHTS_FILE)
    if not any(there):
        return AdapterView(None, None, [_no_adapter(folder)])
    try:
        config = read_config(file_inside(folder, CONFIG_FILE))
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if not there[1]:
        problems.append(f"{WEIGHTS_FILE} is missing{what_else(folder)}")
        return AdapterView(config, None, problems)
    opener = opener or (lambda: open_weights(folder, WEIGHTS_FILE))
    if config is not None and config.get("peft_type") == adalora.KIND:
        return adalora.view_adalora(config, opener, problems)
    return AdapterView(config, opener, problems, trained_beside(folder))


def inspect_view(
    name: str, path: Path, folder: Path | None, view: AdapterView, keep: Callable[[str], bool] | None = None
) -> AdapterHeader:
    """Check what a format's reader made of `path`; gates are looked for in `folder`. Raises as `inspect_adapter`."""
    problems = list(view.problems)
    config, rules = view.config or {}, None
    if view.config is not None:
        rules, reasons = check_config(of_modules(config, keep))
        problems += reasons
    headers = read_headers(view, problems)
    refused = refused_fields(of_modules(config, keep))
    keys = sort_keys(headers, refused)
    loras, misfits = find_stacked(keys.parts(headers), rules, keep)
    if keep is not None:
        keys = sort_keys(headers, refused, keep, {path: lora.all_modules() for path, lora in loras.items()})
    modules: dict[str, ModuleHeader] = {}
    alphas: dict[str, Alpha] = {}
    parts, stacked = {}, {}
    # what the tensors of another kind of adapter lack is no news
    if config.get("peft_type", "LORA") == "LORA" and "enable_lora" not in refused:
        problems += keys.problems
        if headers and not keys.keys and not keys.problems:
            problems.append("there is no LoRA weight among its tensors")
        problems += dict.fromkeys(said for path, said in misfits.items() if path in keys.keys)
        found = {path: of for path, of in keys.parts(headers).items() if path not in misfits}
        parts, stacked = take_stacked(found, loras)
        modules, alphas = _check_modules(parts, rules, problems, stacked)
    # gates are matched against modules only when the modules could be understood
    widths = {path: module.in_features for path, module in modules.items()}
    gates: dict[str, GateSet] = {}
    try:
        gates = read_gates(folder, None if problems else widths, keep) if folder is not None else {}
    except AdapterError as error:
        problems += error.problems
    if problems or rules is None or view.open is None:
        raise AdapterError(problems, heading(name, path))
    claims = _claims(folder, keys, headers, rules, modules)
    notes = list(view.notes)
    if keep is None:
        notes += rules.notes(alphas, claims)
        notes += stacked_notes(stacked, parts, rules, config.get("peft_version"))
    else:  # what is not taken is not missed
        claims = replace(claims, targets=None)
    sources = {path: keys.keys[module.slice.stored if module.slice else path] for path, module in modules.items()}
    return AdapterHeader(
        name, folder, rules.base_model, config, modules, gates, headers, view.open, sources, notes, claims, path
    )


def _claims(
    folder: Path | None,
    keys: SortedKeys,
    headers: Mapping[str, TensorHeader],
    rules: LoraRules,
    modules: Mapping[str, ModuleHeader],
) -> BaseClaims:
    saved = {own: SavedTensor(headers[key].shape, key, folder, WEIGHTS_FILE) for own, key in keys.saved.items()}
    scalings = {module: header.scaling for module, header in modules.items()} if rules.init else {}
    return BaseClaims(saved, rules.init, scalings, rules.targets.known(modules))


def heading(name: str, folder: Path | None) -> str:
    return f"adapter {name!r}{f' in {folder}' if folder is not None else ''} cannot be used"


def _no_adapter(folder: Path) -> str:
    """What to say of a folder with nothing of an adapter: what it holds instead, such as adapters."""
    try:
        with os.scandir(folder) as entries:
            found = sorted(
                entry.name
                for entry in itertools.islice(entries, MAX_SCANNED)
                if os.path.lexists(os.path.join(entry.path, CONFIG_FILE))
            )
    except OSError:  # a hint is not worth an error of its own
        found = []
    if not found:
        return f"it is no adapter: {CONFIG_FILE} is missing, and so is {WEIGHTS_FILE}{what_else(folder)}"
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return (
        f"it is no adapter but holds {counted(len(found), 'adapter folder')} ({', '.join(found[:MAX_NAMED])}{more}): "
        f"pass {'that' if len(found) == 1 else 'those'}, such as {folder / found[0]}"
    )


def read_headers(view: AdapterView, problems: list[str]) -> dict[str, TensorHeader]:
    if view.open is None:
        return {}
    try:
        with view.open() as tensors:
            headers = dict(tensors.headers)
    except (ValueError, OSError) as error:
        problems.append(str(error))
        return {}
    if not headers and not problems:
        problems.append(f"{WEIGHTS_FILE} holds no tensor")
    return headers


def _check_modules(
    parts: Mapping[str, Mapping[str, TensorHeader]],
    rules: LoraRules | None,
    problems: list[str],
    stacked: Mapping[str, StackedLora],
) -> tuple[dict[str, ModuleHeader], dict[str, Alpha]]:
    """({module path: header}, {path: alpha}) of the modules that are right; those of a `stacked` parameter are its
    slices.
    """
    modules: dict[str, ModuleHeader] = {}
    alphas: dict[str, Alpha] = {}
    if rules is not None and (reasons := rules.work_problems(parts)):
        problems += reasons
        rules = None
    layers = [path for path in parts if path not in stacked]
    left_out = rules.targets.left_out(layers) if rules is not None else {}
    for path, found in parts.items():
        reasons = shape_problems(found)
        if not reasons and rules is not None:
            alphas[path] = rules.alpha_of(path, found["A"].shape[0])
            reasons = _disagreements(path, found, rules, alphas[path])
        if path in left_out:
            reasons.append(f"the file has weights for it, {left_out[path]}")
        problems += [f"{path}: {reason}" for reason in reasons]
        if not reasons:
            rank, in_features = found["A"].shape
            modules[path] = ModuleHeader(
                in_features=in_features,
                out_features=found["B"].shape[0],
                rank=rank,
                scaling=rules.scaling(alphas[path].value, rank) if rules is not None else 1.0,
                dtype=common_dtype(FLOATS[part.dtype] for part in found.values()),
                has_bias="bias" in found,
                nbytes=sum(part.nbytes for part in found.values()),
            )
    for path, lora in stacked.items():
        if (header := modules.pop(path, None)) is not None:
            modules |= {name: replace(header, slice=part) for name, part in lora.modules().items()}
    return modules, alphas


def _disagreements(path: str, found: Mapping[str, TensorHeader], rules: LoraRules, alpha: Alpha) -> list[str]:
    """Where the config and the tensors of a module contradict each other."""
    problems = []
    if problem := rules.rank_problem(path, found["A"].shape[0]):
        problems.append(problem)
    if alpha.unread:
        problems.append(
            f"alpha_pattern has {show(list(alpha.unread))}, whose syntax is not read; it would change its scaling "
            f"(alpha {alpha.value:g}) if it matched; name the modules in plain words"
        )
    if rules.lora_bias != ("bias" in found):
        problems.append(
            f"the config says lora_bias {str(rules.lora_bias).lower()}, the file "
            f"{'holds' if 'bias' in found else 'lacks'} lora_B.bias"
        )
    return problems
