"""AdaLoRA of PEFT: LoRA whose ranks were pruned while it was trained, with singular values of its own.

    <module>.lora_A [R,D], .lora_E [R,1], .lora_B [O,R]      y = W x + s * B (E * A) x,  s = alpha / (init_r + 1e-5)

so lora_E * lora_A is the A of a plain LoRA with that scaling. R is what was left of init_r, other in every module, and
0 where nothing was. (Zhang et al. 2023, arXiv 2303.10512, eq. 3; the scaling is that of PEFT 0.21,
tuners/adalora/layer.py, which for an alpha that is not positive depends on when a module was pruned.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...files.safefile import FLOATS, TensorHeader
from ..keys import PREFIX
from .peft_rules import finite_number
from .view import AdapterView, OpenTensors, peft_config

KIND = "ADALORA"
# of the training, or other in a plain LoRA
_OWN = (
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
    "use_rslora",
)
_PARTS = {".lora_A": ".lora_A.weight", ".lora_B": ".lora_B.weight"}


def view_adalora(
    config: Mapping[str, Any], opener: Callable[[], AbstractContextManager[OpenTensors]], problems: list[str]
) -> AdapterView:
    """A PEFT folder whose config says AdaLoRA, as a plain LoRA."""
    alpha, init_r = (finite_number(config.get(field), field, problems) for field in ("lora_alpha", "init_r"))
    for field, value, least in (("lora_alpha", alpha, 1e-30), ("init_r", init_r, 1.0)):
        if value < least:
            problems.append(f"{field} of an AdaLoRA must be positive, got {value:g}")
    scaling = alpha / (max(init_r, 1.0) + 1e-5)
    try:
        with opener() as stored:
            found = dict(stored.headers)
    except (ValueError, OSError) as error:
        return AdapterView(problems=[*problems, str(error)])
    if plain := [key for key in found if key.endswith((".lora_A.weight", ".lora_B.weight"))]:
        problems.append(
            f"peft_type {KIND!r} names its factors lora_A, lora_E and lora_B, the file has {plain[0][:200]!r}"
        )
    names: dict[str, str] = {}  # PEFT's key of a plain LoRA: the key in the file
    for key, header in found.items():
        suffix = key[-len(".lora_A") :]
        factor = key[: -len(suffix)] + ".lora_E"
        if suffix == ".lora_E" or (suffix in _PARTS and 0 in header.shape):
            continue
        name = key[: -len(suffix)] + _PARTS[suffix] if suffix in _PARTS else key
        if names.setdefault(name, key) != key:
            problems.append(f"{key} and {names[name]} are the same factor")
        if suffix == ".lora_A" and (factor not in found or found[factor].shape != (*header.shape[:1], 1)):
            got = list(found[factor].shape) if factor in found else "none"
            problems.append(f"{factor} must be [R, 1] for lora_A {list(header.shape)}, got {got}")
    headers = {
        name: TensorHeader(found[key].shape, _folded_as(found[key])) if key.endswith(".lora_A") else found[key]
        for name, key in names.items()
    }
    ranks = {
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight"): header.shape[0]
        for name, header in headers.items()
        if name.endswith(".lora_A.weight") and len(header.shape) == 2
    }
    lora = {key: value for key, value in config.items() if key not in _OWN}
    fields = peft_config(ranks, {path: scaling * rank for path, rank in ranks.items()}, None)
    for key in ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        lora[key] = fields[key]

    @contextmanager
    def open_folded() -> Iterator[_Folded]:
        with opener() as stored:
            yield _Folded(headers, names, stored)

    return AdapterView(lora, open_folded, problems)


@dataclass(frozen=True)
class _Folded:
    headers: dict[str, TensorHeader]
    names: Mapping[str, str]
    stored: OpenTensors

    def read(self, key: str) -> Tensor:
        name = self.names[key]
        values = self.stored.read(name)
        if not name.endswith(".lora_A"):
            return values
        dtype = FLOATS[self.headers[key].dtype]
        return values.to(dtype) * self.stored.read(name.removesuffix("A") + "E").to(dtype)


def _folded_as(header: TensorHeader) -> str:
    """The dtype in which lora_E * lora_A is formed; what is no float keeps its own, and is refused by it."""
    return "F64" if header.dtype == "F64" else "F32" if header.dtype in FLOATS else header.dtype
