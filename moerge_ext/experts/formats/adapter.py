"""A checked adapter: the sizes of its modules, and what a module of each kind of adapter holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ...files.safefile import TensorHeader
from ..claims import BaseClaims
from ..gates import GateSet
from .peft_parameters import Slice
from .view import OpenTensors

LORA, SCALE_IN, SCALE_OUT, BOTTLENECK = "lora", "scale_in", "scale_out", "bottleneck"  # the kinds of modules
# field: its name in files
PARTS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "bias": "lora_B.bias",
    "scale": "ia3_l",
    "down": "adapter_down.weight",
    "down_bias": "adapter_down.bias",
    "up": "adapter_up.weight",
    "up_bias": "adapter_up.bias",
    "factor": "scaling",
}


class ModuleWeights(Protocol):
    """What one module of one adapter holds, as stored."""

    def parts(self) -> dict[str, Tensor]:
        """Its tensors by the names they have in files."""

    def copy(self) -> Self:
        """The same in memory of its own."""


class _Weights:
    def parts(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {PARTS[name]: value for name, value in found.items() if isinstance(value, Tensor)}

    def copy(self) -> Self:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.clone() for name, value in found.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class LoraWeights(_Weights):
    """One module of one adapter: y += scaling * (lora_B lora_A x + bias). All tensors as stored, unscaled."""

    lora_A: Tensor  # [R,D]
    lora_B: Tensor  # [O,R]
    scaling: float
    bias: Tensor | None = None  # [O]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def idle(self) -> bool:
        """Whether it adds nothing to any input."""
        works = bool(self.lora_A.any() and self.lora_B.any())
        return not works and (self.bias is None or not self.bias.any())


@dataclass(frozen=True)
class ScaleWeights(_Weights):
    """One module of an (IA)3: y = W (scale * x) + b where it is `on_input`, else y = scale * (W x + b)."""

    scale: Tensor  # [D] or [O]
    on_input: bool
    in_features: int
    out_features: int


@dataclass(frozen=True)
class BottleneckWeights(_Weights):
    """One bottleneck adapter: y = h + factor * (up f(down z + down_bias) + up_bias), h = W x + b.

    f: `activation`. z is h, or, `after_residual`, h with the residual of its block added
    (and normalized, where the block has a norm there).
    """

    down: Tensor  # [M,O]
    down_bias: Tensor  # [M]
    up: Tensor  # [O,M]
    up_bias: Tensor  # [O]
    factor: Tensor  # [1] or [O]
    activation: str
    after_residual: bool
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Adapter:
    """A checked adapter with its tensors in memory."""

    name: str
    folder: Path | None
    base_model: str | None
    config: dict[str, Any]
    modules: dict[str, ModuleWeights]
    gates: dict[str, GateSet] = field(default_factory=dict)
    claims: BaseClaims = field(default_factory=BaseClaims)


@dataclass(frozen=True)
class ModuleHeader:
    """Sizes and scaling of one module of one adapter. `rank` is that of a LoRA, else 0."""

    in_features: int  # D
    out_features: int  # O
    rank: int  # R
    scaling: float
    dtype: torch.dtype
    has_bias: bool
    nbytes: int
    slice: Slice | None = None  # of a stacked parameter's tensors
    kind: str = LORA
    activation: str = ""  # of a bottleneck
    after_residual: bool = False
    factor: float = 1.0  # of a bottleneck whose file holds none


@dataclass(frozen=True)
class AdapterHeader:
    """A checked adapter whose tensors are still in its file; `read` yields them one module at a time.

    folder: where gates lie and are written, or None for an adapter that is one file among others.
    """

    name: str
    folder: Path | None
    base_model: str | None
    config: dict[str, Any]
    modules: dict[str, ModuleHeader]
    gates: dict[str, GateSet]
    headers: dict[str, TensorHeader] = field(repr=False)
    open: Callable[[], AbstractContextManager[OpenTensors]] = field(repr=False)
    keys: dict[str, dict[str, str]] = field(repr=False)  # {module path: {"A" | "B" | "bias" | "scale": its key}}
    notes: list[str] = field(default_factory=list)  # what is odd about it and no reason to refuse
    claims: BaseClaims = field(default_factory=BaseClaims)
    path: Path | None = None  # of the folder or file

    def read(self) -> Iterator[tuple[str, ModuleWeights]]:
        """(module path, weights) of every module. The tensors may be the reader's own: copy what you
        keep.
        """
        with self.open() as tensors:
            for path, module in self.modules.items():
                parts = {part: self._read(tensors, key) for part, key in self.keys[path].items()}
                if module.slice is not None:
                    parts = {part: module.slice.of(part, tensor) for part, tensor in parts.items()}
                yield path, _weights(module, parts)

    def _read(self, tensors: OpenTensors, key: str) -> Tensor:
        if tensors.headers.get(key) != self.headers[key]:
            raise ValueError(f"{key} changed while it was being read")
        return tensors.read(key)


def _weights(module: ModuleHeader, parts: dict[str, Tensor]) -> ModuleWeights:
    if module.kind == LORA:
        return LoraWeights(parts["A"], parts["B"], module.scaling, parts.get("bias"))
    if module.kind == BOTTLENECK:
        factor = parts.pop("factor", torch.tensor([module.factor], dtype=torch.float32, device="cpu"))
        said = {name: getattr(module, name) for name in ("activation", "after_residual", "in_features", "out_features")}
        return BottleneckWeights(factor=factor, **parts, **said)
    scale = parts["scale"].flatten()
    return ScaleWeights(scale, module.kind == SCALE_IN, module.in_features, module.out_features)


def common_dtype(dtypes) -> torch.dtype:
    """The smallest dtype that holds all of them (float16 with bfloat16 gives float32)."""
    common, *others = dict.fromkeys(dtypes)
    for dtype in others:
        common = torch.promote_types(common, dtype)
    return common
