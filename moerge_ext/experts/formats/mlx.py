"""LoRA adapters of MLX-LM: adapter_config.json and adapters.safetensors.

    <module>.lora_a [D,R], <module>.lora_b [R,O]         y = W x + scale * (x lora_a) lora_b

The scale stands in the config, lora_parameters.scale. (Facts: mlx-lm 0.32.2, tuner/lora.py and tuner/utils.py.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.safefile import TensorHeader, file_inside, open_tensors, read_headers, read_tensor
from ..keys import PREFIX
from .peft_config import read_config
from .peft_rules import finite_number, show
from .view import AdapterView, one_line_a_cause, peft_config

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapters.safetensors"
_PARTS = {".lora_a": "lora_A.weight", ".lora_b": "lora_B.weight"}
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embedding")


def view_mlx(folder: Path) -> AdapterView:
    """The adapter in a resolved folder as PEFT would have it."""
    problems: list[str] = []
    notes: list[str] = []
    config: dict[str, Any] = {}
    try:
        config = read_config(file_inside(folder, CONFIG_FILE))
    except (ValueError, OSError) as error:
        problems.append(str(error))
    else:
        problems += _kind_problems(config)
    scale = _scale(config, problems, notes) if not problems else 1.0
    try:
        path = file_inside(folder, WEIGHTS_FILE)
        with open_tensors(path) as handle:
            stored = read_headers(handle)
    except (ValueError, OSError) as error:
        return AdapterView(problems=[*problems, str(error)])
    if not stored:
        problems.append(f"{WEIGHTS_FILE} holds no tensor")
    keys: dict[str, str] = {}  # PEFT's key: MLX's
    causes: dict[str, list[str]] = {}
    for key, header in stored.items():
        name, why = _peft_key(key, header)
        if why:
            causes.setdefault(why, []).append(key)
        else:
            keys[name] = key
    problems += one_line_a_cause(causes)
    headers = {name: TensorHeader(stored[key].shape[::-1], stored[key].dtype) for name, key in keys.items()}
    ranks = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): header.shape[0]
        for name, header in headers.items()
        if name.endswith(".lora_A.weight") and len(header.shape) == 2
    }
    model = config.get("model")
    base_model = model if isinstance(model, str) and model else None
    view = peft_config(ranks, {module: scale * rank for module, rank in ranks.items()}, base_model)

    @contextmanager
    def open_file() -> Iterator[_OpenMlx]:
        with open_tensors(path) as opened:
            yield _OpenMlx(opened, headers, keys, stored)

    return AdapterView(view, open_file, problems, notes)


@dataclass(frozen=True)
class _OpenMlx:
    handle: Any
    headers: dict[str, TensorHeader]
    keys: Mapping[str, str]
    stored: Mapping[str, TensorHeader]

    def read(self, key: str) -> Tensor:
        stored = self.keys[key]
        return read_tensor(self.handle, stored, self.stored[stored]).T


def _kind_problems(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("fine_tune_type", "lora")
    if kind == "lora":
        return []
    reasons = {
        "dora": "DoRA rescales the whole weight, which a routed sum of experts cannot do",
        "full": "whole layers were trained, not an adapter",
    }
    return [f"fine_tune_type = {show(kind)}: {reasons.get(str(kind), 'expected lora')}"]


def _scale(config: Mapping[str, Any], problems: list[str], notes: list[str]) -> float:
    """lora_parameters.scale; a note where mlx-lm's versions read the config differently."""
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict) or "scale" not in parameters:
        problems.append(f"{CONFIG_FILE} of an MLX-LM adapter must have lora_parameters.scale, got {show(parameters)}")
        return 1.0
    scale = finite_number(parameters["scale"], "lora_parameters.scale", problems)
    # until 0.14.1 the scale was multiplied by alpha / rank; later versions keep the field and do not read it
    if "alpha" in parameters and "fine_tune_type" not in config:
        alpha, rank = (
            finite_number(parameters.get(key), f"lora_parameters.{key}", problems) for key in ("alpha", "rank")
        )
        if not problems and rank and alpha != rank:
            notes.append(
                f"lora_parameters has alpha {alpha:g} beside scale {scale:g}: read as mlx-lm does from 0.14.2 on, by "
                f"scale alone. If an older one trained it, set scale to {scale * alpha / rank:g} and remove alpha"
            )
    return scale


def _peft_key(key: str, header: TensorHeader) -> tuple[str, str | None]:
    """(PEFT's key, why there is none)."""
    suffix = next((suffix for suffix in _PARTS if key.endswith(suffix)), None)
    if suffix is None:
        if key.endswith(".m"):
            return "", "belongs to DoRA, which is not supported"
        if key.endswith((".A", ".B")):
            return "", "of mlx-vlm's layout; only MLX-LM's (.lora_a, .lora_b) is read"
        return "", "not a LoRA weight of MLX-LM (.lora_a or .lora_b)"
    module = key.removesuffix(suffix)
    if module.rpartition(".")[2] in _EMBEDDINGS:
        return "", "LoRA on an embedding, which is not a linear layer"
    if len(header.shape) == 3:
        return "", "3 sizes: LoRA on the experts of a mixture, which are no linear layers"
    return f"{PREFIX}{module}.{_PARTS[suffix]}", None
