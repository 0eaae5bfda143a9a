"""By what a sidecar knows the adapter that it was made for: a digest of its weights, noted in its header.

Of every module the path, the shapes, the scaling, and the first and last values of each factor, as float32: two
trainings differ in nearly all of them, and a type that holds the same values makes no difference.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formats.adapter import LoraWeights, ModuleWeights
from .keys import PREFIX

ADAPTER_KEY, NAME_KEY = "adapter", "adapter_name"
SAMPLE = 512  # values of either end


class Fingerprint:
    """The digest of modules that are added in any order."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def add(self, path: str, weights: ModuleWeights) -> None:
        said = repr(weights.scaling) if isinstance(weights, LoraWeights) else " ".join(weights.parts())
        digest = hashlib.sha256(f"{path} {said}".encode())
        for tensor in weights.parts().values():
            digest.update(f" {list(tensor.shape)}".encode())
            digest.update(_ends(tensor))
        self._parts.append(digest.digest())

    def digest(self) -> str:
        return hashlib.sha256(b"".join(sorted(self._parts))).hexdigest()[:32]


def fingerprint(modules: Iterable[tuple[str, ModuleWeights]]) -> str:
    """The digest of (module path, weights) pairs in any order."""
    found = Fingerprint()
    for path, weights in modules:
        found.add(path, weights)
    return found.digest()


def note_of_adapter(name: str, modules: Mapping[str, ModuleWeights]) -> dict[str, str]:
    """The entries of a sidecar's header."""
    return {ADAPTER_KEY: fingerprint(modules.items()), NAME_KEY: name}


def with_tensors(modules: Mapping[str, ModuleWeights], tensors: Mapping[str, Tensor]) -> dict[str, ModuleWeights]:
    """The modules with those of `tensors` ({PEFT's key: tensor}) that are theirs."""
    found = {}
    for path, old in modules.items():
        a, b, bias = (tensors.get(f"{PREFIX}{path}.lora_{key}") for key in ("A.weight", "B.weight", "B.bias"))
        new = {"lora_A": a, "lora_B": b, "bias": bias}
        found[path] = replace(old, **{part: tensor for part, tensor in new.items() if tensor is not None})
    return found


def note_of_file(header: Any) -> dict[str, str]:
    """The same of a checked adapter whose tensors are in its file; with a warning nothing when they cannot be read."""
    try:
        return {ADAPTER_KEY: fingerprint(header.read()), NAME_KEY: header.name}
    except ValueError as error:
        warnings.warn(f"adapter {header.name!r} is not noted in what is written for it: {error}", stacklevel=3)
        return {}


def _ends(tensor: Tensor) -> np.ndarray:
    """The first SAMPLE values and the last, which of a small tensor are the same ones twice."""
    flat = tensor.detach().reshape(-1)
    ends = torch.cat([flat[:SAMPLE], flat[-SAMPLE:]])
    return ends.to("cpu", torch.float32).numpy()
