"""(IA)3 of PEFT (Liu et al. 2022, arXiv 2205.05638, section 3.3): a vector that scales a layer's input or output.

    <module>.ia3_l [O,1]     y = l * (W x + b)      the keys and values of attention, in the paper
    <module>.ia3_l [1,D]     y = W (l * x) + b      `feedforward_modules` of the config

as PEFT 0.21 computes it (tuners/ia3/layer.py). The shape decides which it is. A file holds one of the layer's two
sizes only; `layer_sizes.py` finds the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...files.safefile import FLOATS, AdapterError, TensorHeader, path_problem
from ..claims import BaseClaims, SavedTensor
from ..gates import GateSet, read_gates
from ..keys import bare_path
from .adapter import SCALE_IN, SCALE_OUT, AdapterHeader, ModuleHeader
from .peft_config import check_config, refused_fields
from .peft_keys import sort_keys
from .peft_rules import Alpha, LoraRules, show, some_of
from .view import AdapterView

KIND = "IA3"
_OWN = ("feedforward_modules", "init_ia3_weights")
_SUFFIX = ".ia3_l"


def inspect_ia3(
    name: str,
    folder: Path,
    view: AdapterView,
    headers: Mapping[str, TensorHeader],
    keep: Callable[[str], bool] | None,
    *,
    heading: str,
    file: str,
) -> AdapterHeader:
    """Check a PEFT folder whose config says (IA)3; `headers` are its tensors', `file` the name of their file.

    Widths of layers that the file does not hold are 0. Raises AdapterError, under `heading`, with every problem.
    """
    problems, config = list(view.problems), view.config
    # what the two kinds have in common is checked by the rules of LoRA
    shared = {key: value for key, value in config.items() if key not in _OWN}
    rules, reasons = check_config(shared | {"peft_type": "LORA", "lora_alpha": 1})
    problems += reasons
    own = {key: header for key, header in headers.items() if key.endswith(_SUFFIX)}
    keys = {key: bare_path(key.removesuffix(_SUFFIX)) for key in own}
    keys = {key: path for key, path in keys.items() if keep is None or keep(path)}
    rest = sort_keys({key: header for key, header in headers.items() if key not in own}, refused_fields(shared), keep)
    if not own and headers:
        problems.append(f"there is no (IA)3 vector (<module>{_SUFFIX}) among its tensors")
    if own and not keys:
        problems.append(f"modules=... takes none of its modules (one of them: {bare_path(next(iter(own)))})")
    problems += rest.problems if keep is None else []
    if rest.keys:
        problems.append(f"the config says (IA)3, and the file has LoRA weights ({some_of(list(rest.keys))})")
    modules = _modules(keys, own, config, rules, problems)
    gates = _gates(folder, modules, keep, problems)
    if problems or rules is None or view.open is None:
        raise AdapterError(problems, heading)
    saved = {path: SavedTensor(headers[key].shape, key, folder, file) for path, key in rest.saved.items()}
    claims = BaseClaims(saved, targets=rules.targets.known(modules) if keep is None else None)
    notes = view.notes + (rules.notes({path: Alpha(1.0) for path in modules}, claims) if keep is None else [])
    stored = {path: {"scale": key} for key, path in keys.items()}
    return AdapterHeader(
        name, folder, rules.base_model, config, modules, gates, dict(headers), view.open, stored, notes, claims, folder
    )


def _modules(
    keys: Mapping[str, str],
    headers: Mapping[str, TensorHeader],
    config: Mapping[str, Any],
    rules: LoraRules | None,
    problems: list[str],
) -> dict[str, ModuleHeader]:
    """{module path: header} of {key: module path}."""
    modules: dict[str, ModuleHeader] = {}
    left_out = rules.targets.left_out(list(keys.values())) if rules is not None else {}
    for key, path in keys.items():
        header = headers[key]
        reasons = [why] if (why := path_problem(path)) else _shape_problems(header)
        if path in modules:
            reasons.append("two (IA)3 vectors are for it")
        if path in left_out:
            reasons.append(f"the file has a vector for it, {left_out[path]}")
        on_input = header.shape[:1] == (1,)
        reasons += [] if reasons else _feedforward_problems(path, on_input, config.get("feedforward_modules"))
        problems += [f"{path}: {reason}" for reason in reasons]
        if not reasons:
            width = max(header.shape)
            modules[path] = ModuleHeader(
                in_features=width if on_input else 0,
                out_features=0 if on_input else width,
                rank=0,
                scaling=1.0,
                dtype=FLOATS[header.dtype],
                has_bias=False,
                nbytes=header.nbytes,
                kind=SCALE_IN if on_input else SCALE_OUT,
            )
    return modules


def _shape_problems(header: TensorHeader) -> list[str]:
    if header.dtype not in FLOATS:
        return [f"ia3_l must be one of {', '.join(FLOATS)}, got {header.dtype}"]
    shape = list(header.shape)
    if len(shape) != 2 or 1 not in shape or 0 in shape:
        hint = " ((IA)3 of a convolution)" if len(shape) > 2 else ""
        return [f"ia3_l must be [O, 1] or [1, D], got {shape}{hint}"]
    if shape == [1, 1]:
        return ["ia3_l is [1, 1], of which nobody can tell whether it scales the input or the output"]
    return []


def _feedforward_problems(path: str, on_input: bool, named: Any) -> list[str]:
    """Where a list of feedforward modules contradicts the tensor, as PEFT would when it loads the file."""
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        return []
    if on_input == any(path.endswith(name) for name in named):
        return []
    says = "scales the input ([1, D])" if on_input else "scales the output ([O, 1])"
    return [f"its ia3_l {says}, and feedforward_modules {show(named)} {'leaves it out' if on_input else 'names it'}"]


def _gates(
    folder: Path, modules: dict[str, ModuleHeader], keep: Callable[[str], bool] | None, problems: list[str]
) -> dict[str, GateSet]:
    """The gates beside the adapter, which tell the input's width where the file does not."""
    try:
        for found in read_gates(folder, None, keep).values():
            for path, gate in found.gates.items():
                if path in modules and not modules[path].in_features:
                    modules[path] = replace(modules[path], in_features=len(gate))
        return read_gates(folder, {path: m.in_features for path, m in modules.items()} if not problems else None, keep)
    except AdapterError as error:
        problems += error.problems
        return {}
