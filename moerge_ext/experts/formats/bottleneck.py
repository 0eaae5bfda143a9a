"""Bottleneck adapters of the library `adapters` (AdapterHub): Houlsby et al. 2019 (double_seq_bn) and Pfeiffer et al.
2020 (seq_bn), after the attention and the feedforward block of a layer.

    adapter_config.json     {"config": {...}, "model_type": ..., "hidden_size": H}
    adapter.safetensors     <block>.adapters.<name>.adapter_down.0.weight [M,H], .bias [M]
                            <block>.adapters.<name>.adapter_up.weight [H,M], .bias [H]; .scaling [1] or [H] if learned

    y = h + scaling * (up f(down z))        h: what the block's last linear layer returns
    z = h                                   original_ln_before false (Houlsby)
    z = LN(h + r), or h + r without LN      original_ln_before true (Pfeiffer); r: the residual of the block

as adapters 1.3 computes it (methods/modeling.py). Each is shown as an expert on that linear layer, whose router sees
the layer's input.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...files.safefile import FLOATS, AdapterError, TensorHeader, file_inside, path_problem
from ...files.shards import open_weights
from ..gates import GateSet, read_gates
from .adapter import BOTTLENECK, AdapterHeader, ModuleHeader, common_dtype
from .peft_config import read_config
from .peft_rules import show
from .pickled import open_pickle

WEIGHTS_FILE, PICKLE, CONFIG_FILE = "adapter.safetensors", "pytorch_adapter.bin", "adapter_config.json"
MAX_SCALING = 1e6
ACTIVATIONS = ("gelu", "gelu_new", "leakyrelu", "relu", "sigmoid", "silu", "swish", "tanh")
# {model_type: {what stands before ".adapters." in a key: the block's last linear layer}}
_BERT = {"attention.output": "attention.output.dense", "output": "output.dense"}
_LLAMA = {"attention_adapters": "self_attn.o_proj", "output_adapters": "mlp.down_proj"}
_GPT2 = {"attention_adapters": "attn.c_proj", "output_adapters": "mlp.c_proj"}
PLACES = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "llama": _LLAMA, "mistral": _LLAMA, "gpt2": _GPT2}
_KEY = re.compile(
    r"(?P<layer>.+\.\d+)\.(?P<place>[a-z_.]+)\.adapters\.(?P<name>[^.]+)\."
    r"(?P<part>adapter_down\.0\.weight|adapter_down\.0\.bias|adapter_up\.weight|adapter_up\.bias|scaling)"
)
_PARTS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "factor",
}
_INERT = frozenset(
    ["mh_adapter", "output_adapter", "reduction_factor", "init_weights", "init_weights_seed", "leave_out", "dropout"]
    + ["adapter_residual_before_ln", "inv_adapter_reduction_factor", "stochastic_depth", "architecture", "phm_dim"]
    + ["factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range"]
    + ["learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "non_linearity", "scaling"]
    + ["original_ln_before", "original_ln_after", "residual_before_ln"]
)
_REFUSED = {
    "is_parallel": "a parallel adapter reads the block's input",
    "ln_before": "it has a norm of its own before the bottleneck",
    "ln_after": "it has a norm of its own after the bottleneck",
    "use_gating": "its gate averages over the sequence",
    "phm_layer": "its matrices are Kronecker products (Compacter)",
    "inv_adapter": "it has an invertible adapter on the embeddings",
    "cross_adapter": "it acts after cross attention",
}


def is_bottleneck(folder: Path) -> bool:
    """Whether a folder is one of the library `adapters` and none of PEFT."""
    return any(os.path.lexists(folder / file) for file in (WEIGHTS_FILE, PICKLE)) and not any(
        folder.glob("adapter_model*")
    )


def inspect_bottleneck(
    name: str, folder: Path, keep: Callable[[str], bool] | None, *, heading: str, allow_pickle: bool = False
) -> AdapterHeader:
    """Check a folder of `adapters`; widths of layers' inputs, which the file does not hold, are 0. AdapterError."""
    safe = os.path.lexists(folder / WEIGHTS_FILE)
    opener = partial(open_weights, folder, WEIGHTS_FILE) if safe else partial(open_pickle, folder, PICKLE)
    try:
        fields = read_config(file_inside(folder, CONFIG_FILE))
        if not safe and not allow_pickle:
            raise ValueError(
                f"{PICKLE} is a pickle, which can run code when it is opened, and is never read here: convert it once "
                "with `moerge convert FOLDER OUT --allow-pickle` (torch.load, weights only)"
            )
        with opener() as stored:
            headers = dict(stored.headers)
    except (ValueError, OSError) as error:
        raise AdapterError([str(error)], heading) from None
    problems = _config_problems(fields)
    understood = not problems
    config = fields["config"] if isinstance(fields.get("config"), dict) else {}
    keys = _sorted_keys(headers, PLACES.get(str(fields.get("model_type")), {}), keep, problems)
    modules: dict[str, ModuleHeader] = {}
    for path, parts in keys.items():
        reasons = _shape_problems({part: headers[key] for part, key in parts.items()}, config.get("scaling"))
        problems += [f"{path}: {reason}" for reason in reasons]
        if not reasons and understood:
            modules[path] = _header({part: headers[key] for part, key in parts.items()}, config)
    gates = _gates(folder, modules, keep, problems)
    if problems:
        raise AdapterError(problems, heading)
    base = fields.get("model_name")
    return AdapterHeader(
        name,
        folder,
        base if isinstance(base, str) and base else None,
        fields,
        modules,
        gates,
        headers,
        opener,
        keys,
        path=folder,
    )


def _config_problems(fields: Mapping[str, Any]) -> list[str]:
    config, kind = fields.get("config"), fields.get("model_type")
    if not isinstance(config, dict):
        return ["adapter_config.json has no group 'config', as the library adapters writes it"]
    problems = []
    if not isinstance(kind, str) or kind not in PLACES:
        problems.append(f"model_type must be one of {', '.join(PLACES)}, got {show(kind)}")
    if config.get("architecture") not in (None, "bottleneck") or "non_linearity" not in config:
        problems.append(f"it is no bottleneck adapter (architecture {show(config.get('architecture'))})")
    for key, value in config.items():
        if value and key not in _INERT:
            problems.append(f"{show(key)} = {show(value)}: {_REFUSED.get(key, 'unknown field, and it is not off')}")
    activation = config.get("non_linearity", "relu")
    if not isinstance(activation, str) or activation.lower() not in ACTIVATIONS:
        problems.append(f"non_linearity must be one of {', '.join(ACTIVATIONS)}, got {show(activation)}")
    if config.get("original_ln_after", True) is not True:
        problems.append("original_ln_after is false: it takes the block's own residual and norm away")
    if config.get("original_ln_before") and config.get("residual_before_ln", True) is not True:
        problems.append(f"residual_before_ln {show(config['residual_before_ln'])}: it replaces the block's output")
    scaling = config.get("scaling", 1.0)
    number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool) and abs(scaling) <= MAX_SCALING
    if not number and scaling not in ("learned", "channel"):
        problems.append(f"scaling must be a number up to {MAX_SCALING:g}, 'learned' or 'channel', got {show(scaling)}")
    return problems


def _sorted_keys(
    headers: Mapping[str, TensorHeader],
    places: Mapping[str, str],
    keep: Callable[[str], bool] | None,
    problems: list[str],
) -> dict[str, dict[str, str]]:
    """{module path: {part: key}}."""
    found: dict[str, dict[str, str]] = {}
    unknown, names = [], set()
    for key in headers:
        match = _KEY.fullmatch(key)
        if match is None or match["place"] not in places:
            unknown.append(key)
            continue
        path = f"{match['layer']}.{places[match['place']]}"
        names.add(match["name"])
        if why := path_problem(path):
            problems.append(why)
        elif keep is None or keep(path):
            found.setdefault(path, {})[_PARTS[match["part"]]] = key
    if len(names) > 1:
        problems.append(f"it holds several adapters ({', '.join(sorted(names))}): save each into a folder of its own")
    if unknown and places:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        problems.append(f"{show(unknown[0])}{more}: no tensor of a bottleneck adapter of this kind of model")
    if not found and not problems:
        problems.append("modules=... takes none of its modules" if headers else "there is no tensor in its file")
    return found


def _shape_problems(found: Mapping[str, TensorHeader], scaling: Any) -> list[str]:
    wanted = ["down", "down_bias", "up", "up_bias"] + (["factor"] if isinstance(scaling, str) else [])
    problems = [f"{part} is missing" for part in wanted if part not in found]
    problems += [f"{part} must be floats, got {h.dtype}" for part, h in found.items() if h.dtype not in FLOATS]
    if problems or len(found["up"].shape) != 2 or 0 in found["up"].shape:
        return problems or [f"adapter_up.weight must be [H, M], got {list(found['up'].shape)}"]
    width, inner = found["up"].shape
    sizes = {"down": [(inner, width)], "down_bias": [(inner,)], "up_bias": [(width,)], "factor": [(1,), (width,)]}
    return [
        f"{part} must be {' or '.join(str(list(size)) for size in sizes[part])}, got {list(header.shape)}"
        for part, header in found.items()
        if part in sizes and header.shape not in sizes[part]
    ]


def _header(found: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> ModuleHeader:
    scaling = config.get("scaling", 1.0)
    return ModuleHeader(
        in_features=0,
        out_features=found["up"].shape[0],
        rank=0,
        scaling=1.0,
        dtype=common_dtype(FLOATS[header.dtype] for header in found.values()),
        has_bias=False,
        nbytes=sum(header.nbytes for header in found.values()),
        kind=BOTTLENECK,
        activation=config["non_linearity"].lower(),
        after_residual=bool(config.get("original_ln_before")),
        factor=1.0 if isinstance(scaling, str) else float(scaling),
    )


def _gates(
    folder: Path, modules: dict[str, ModuleHeader], keep: Callable[[str], bool] | None, problems: list[str]
) -> dict[str, GateSet]:
    """The gates beside the adapter, which tell the input's width."""
    try:
        found = read_gates(folder, None, keep)
    except AdapterError as error:
        problems += error.problems
        return {}
    for gates in found.values():
        for path, gate in gates.gates.items():
            if path in modules:
                problems += _width_problem(path, modules[path].in_features, len(gate))
                modules[path] = replace(modules[path], in_features=len(gate))
            elif not problems and keep is None:
                problems.append(f"{path}: a gate for a module without an adapter here")
    return found


def _width_problem(path: str, known: int, width: int) -> list[str]:
    return [f"{path}: gates of {known} and of {width} numbers"] if known not in (0, width) else []
