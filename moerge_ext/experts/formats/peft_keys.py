"""The tensors of a PEFT file by their names: LoRA factors, parameters of the base saved beside them, and the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...files.safefile import TensorHeader, path_problem
from .peft_rules import show, some_of
from .view import PREFIX

SUFFIXES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias"}
# State of the training alone, of no effect on what a stored adapter computes: VeLoRA's projection for the backward
# pass, MonteCLoRA's sampler.
_TRAINING_STATE = ("lora_velora_embed", "lora_monteclora_sampler")
# (a part of a name, what it means, the field of the config that says so)
_KINDS = (
    ("lora_magnitude_vector", "belongs to DoRA, which is not supported", "use_dora"),
    ("lora_diag", "belongs to KaSA, which is not supported", "kasa_config"),
    ("lora_embedding_", "is LoRA on an embedding, which is not a linear layer", ""),
    (
        "trainable_tokens_",
        "holds trained token embeddings, which replace rows of the base model",
        "trainable_token_indices",
    ),
)


@dataclass
class SortedKeys:
    """parts: {module path: {"A" | "B" | "bias": header}}; saved: {parameter path of the base: key}; problems."""

    parts: dict[str, dict[str, TensorHeader]] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def sort_keys(headers: Mapping[str, TensorHeader], refused: Mapping[str, object]) -> SortedKeys:
    """Sorts the names of a file. One problem for all tensors of a kind, and none for a kind that the config says of
    itself: `refused` holds its fields that were refused already.
    """
    found, kinds = SortedKeys(), {}
    for key, header in headers.items():
        if kind := next((kind for kind in _KINDS if kind[0] in key), None):
            kinds.setdefault(kind, []).append(key)
        elif any(part in _TRAINING_STATE for part in key.split(".")):
            continue
        else:
            _sort(key, header, found)
    for (_, meaning, said_by), keys in kinds.items():
        if said_by not in refused:
            found.problems.append(f"{some_of([show(key) for key in keys])} {meaning}")
    embeddings = {
        path for path in found.saved if any(f"{path.rpartition('.')[0]}.lora_embedding_" in k for k in headers)
    }
    for path in embeddings:  # the embedding itself, saved with the LoRA on it: the same cause
        del found.saved[path]
    return found


def _sort(key: str, header: TensorHeader, found: SortedKeys) -> None:
    part = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
    if not key.startswith(PREFIX) or (part is None and "lora_" in key):
        found.problems.append(_unknown_key(key))
        return
    path = key.removeprefix(PREFIX).removesuffix(part or "")
    if part is None:
        path = _base_path(path)
    if why := path_problem(path):
        found.problems.append(why)
    elif part is not None:
        found.parts.setdefault(path, {})[SUFFIXES[part]] = header
    else:
        found.saved[path] = key


def _base_path(path: str) -> str:
    """The parameter's path in the base model: PEFT's wrappers stand between a module and its parameters."""
    parts = path.split(".")
    if "modules_to_save" in parts:  # early versions left it, some with the adapter's name behind it
        at = parts.index("modules_to_save")
        del parts[at : at + (2 if parts[at + 1 : at + 2] == ["default"] else 1)]
    return ".".join(part for part in parts if part != "base_layer")


def _unknown_key(key: str) -> str:
    shown = repr(key if len(key) <= 200 else key[:200] + "...")
    if ".lora_A." in key or ".lora_B." in key:
        return f"{shown} is not named {PREFIX}<module>.lora_A.weight, .lora_B.weight or .lora_B.bias"
    return f"{shown} is not a LoRA weight, nor a parameter of the base ({PREFIX}<module>.<parameter>)"
