"""The tensors of a PEFT file by their names: LoRA factors, parameters of the base saved beside them, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from ...files.safefile import TensorHeader, path_problem
from ..keys import PREFIX, LoraKey, bare_path, lora_key, module_of
from .peft_rules import show, some_of

# State of the training alone, of no effect on what a stored adapter computes: VeLoRA's projection for the backward
# pass, MonteCLoRA's sampler.
_TRAINING_STATE = ("lora_velora_embed", "lora_monteclora_sampler")
# The base's own module, which modules_to_save keeps beside the trained one: in a state_dict() alone.
_REPLACED = "original_module"
_IGNORED = frozenset([*_TRAINING_STATE, _REPLACED])
OTHERS = "load_experts(..., modules=...) takes the others"
# (a part of a name, what it means, the field of the config that says so)
_KINDS = (
    ("lora_magnitude_vector", "belongs to DoRA, which is not supported", "use_dora"),
    ("lora_diag", "belongs to KaSA, which is not supported", "kasa_config"),
    ("lora_embedding_", f"is LoRA on an embedding, which is not a linear layer; {OTHERS}", ""),
    (
        "trainable_tokens_",
        f"holds trained token embeddings, which replace rows of the base model; {OTHERS}",
        "trainable_token_indices",
    ),
)


@dataclass
class SortedKeys:
    """keys: {module path: {"A" | "B" | "bias": key}}; saved: {parameter path of the base: key}; problems."""

    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    adapters: set[str] = field(default_factory=set)  # the adapters' names that keys hold

    def parts(self, headers: Mapping[str, TensorHeader]) -> dict[str, dict[str, TensorHeader]]:
        return {path: {part: headers[key] for part, key in found.items()} for path, found in self.keys.items()}


def sort_keys(
    headers: Mapping[str, TensorHeader],
    refused: Mapping[str, object],
    keep: Callable[[str], bool] | None = None,
    slices: Mapping[str, Collection[str]] | None = None,
) -> SortedKeys:
    """Sorts the names of a file, those of the modules that `keep` takes. One problem for all tensors of a kind, and
    none for a kind that the config says of itself: `refused` holds its fields that were refused already.

    slices: {module path of keys: the modules that they hold}, where these are others.
    """
    found, kinds, slices = SortedKeys(), {}, slices or {}
    lora_keys = {key: lora for key in headers if (lora := lora_key(key))}
    found.adapters.update(lora.adapter for lora in lora_keys.values() if lora.adapter)
    # the base's parameters have PEFT's prefix where the factors have it
    bare = bool(lora_keys) and not any(PREFIX in key for key in lora_keys)
    taken = [key for key in headers if keep is None or any(map(keep, _modules_of(key, lora_keys.get(key), slices)))]
    for key in taken:
        if kind := next((kind for kind in _KINDS if kind[0] in key), None):
            kinds.setdefault(kind, []).append(key)
        elif _IGNORED.isdisjoint(key.split(".")):
            _sort(key, lora_keys.get(key), bare, found)
    for (_, meaning, said_by), keys in kinds.items():
        if said_by not in refused:
            found.problems.append(f"{some_of([show(key) for key in keys])} {meaning}")
    if len(found.adapters) > 1:
        names = ", ".join(sorted(found.adapters))
        found.problems.append(f"it holds several adapters ({names}): save each into a folder of its own")
    for path in list(found.saved):  # an embedding, saved with the LoRA on it: the same cause
        if any(f"{path.rpartition('.')[0]}.lora_embedding_" in key for key in taken):
            del found.saved[path]
    if scaled := [
        show(found.saved.pop(path))
        for path in list(found.saved)
        if path.endswith(".alpha") and path.removesuffix(".alpha") in found.keys
    ]:
        found.problems.append(
            f"{some_of(scaled)} is a scaling beside the factors, as in kohya's layout: PEFT reads the config alone. "
            "Put what is meant into alpha_pattern and remove it"
        )
    if headers and not taken:
        some = next(iter(_modules_of(key := next(iter(headers)), lora_keys.get(key), slices)))
        found.problems.append(f"modules=... takes none of its modules (one of them: {some}); names=[...] leaves it out")
    return found


def _modules_of(key: str, lora: LoraKey | None, slices: Mapping[str, Collection[str]]) -> Collection[str]:
    return (lora is not None and slices.get(lora.path)) or (module_of(key),)


def _sort(key: str, lora: LoraKey | None, bare: bool, found: SortedKeys) -> None:
    if lora is None and ("lora_" in key or not (bare or PREFIX in key)):
        found.problems.append(_unknown_key(key))
        return
    path = lora.path if lora is not None else base_path(bare_path(key), found.adapters)
    if why := path_problem(path):
        found.problems.append(why)
    elif lora is None:
        found.saved[path] = key
    else:
        first = found.keys.setdefault(path, {}).setdefault(lora.part, key)
        if first != key and len(found.adapters) < 2:
            found.problems.append(f"{path}: {show(first)} and {show(key)} are the same weight twice")


def base_path(path: str, adapters: Collection[str] = ()) -> str:
    """The parameter's path in the base model: PEFT's wrappers stand between a module and its parameters."""
    parts = path.split(".")
    if "modules_to_save" in parts:  # early versions left it, some with the adapter's name behind it
        at = parts.index("modules_to_save")
        del parts[at : at + (2 if parts[at + 1] in ("default", *adapters) else 1)]
    return ".".join(part for part in parts if part != "base_layer")


def _unknown_key(key: str) -> str:
    shown = repr(key if len(key) <= 200 else key[:200] + "...")
    if ".lora_A." in key or ".lora_B." in key:
        return f"{shown} is not named {PREFIX}<module>.lora_A.weight, .lora_B.weight or .lora_B.bias"
    return f"{shown} is not a LoRA weight, nor a parameter of the base ({PREFIX}<module>.<parameter>)"
