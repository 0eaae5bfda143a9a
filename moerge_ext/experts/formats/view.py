"""An adapter of any format as PEFT would have saved it: the one form that is checked, loaded and written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ...files.safefile import TensorHeader


class OpenTensors(Protocol):
    """The tensors of an open adapter, under PEFT's keys and in PEFT's layout (lora_A [R,D], lora_B [O,R])."""

    headers: Mapping[str, TensorHeader]

    def read(self, key: str) -> Tensor:
        """The tensor, which may alias the file. ValueError when the file changed since it was opened."""


@dataclass(frozen=True)
class AdapterView:
    """What a format's reader makes of a folder or file.

    config: the fields of PEFT's adapter_config.json, or None when there are none to trust; open: opens the tensors,
    or None when they cannot be opened; problems: why the adapter cannot be used, as far as the format can tell; notes:
    what is odd about it and no reason to refuse.
    """

    config: dict[str, Any] | None = None
    open: Callable[[], AbstractContextManager[OpenTensors]] | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def one_line_a_cause(causes: Mapping[str, Sequence[str]]) -> list[str]:
    """{what is wrong: the names of the tensors} as problems, with a few of the names in each."""
    lines = []
    for cause, names in causes.items():
        shown = ", ".join(repr(name if len(name) <= 200 else name[:200] + "...") for name in names[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        lines.append(f"{shown}{more}: {cause}")
    return lines


def peft_config(ranks: Mapping[str, int], alphas: Mapping[str, float], base_model: str | None) -> dict[str, Any]:
    """The config of an adapter whose modules have these ranks and alphas (scaling alpha / rank).

    The commonest values stand in `r` and `lora_alpha`, the others in the patterns, by whole paths.
    """
    rank = _commonest(ranks.values(), 1)
    alpha = _commonest(alphas.values(), 1.0)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": sorted(ranks),
        "rank_pattern": {path: value for path, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {path: value for path, value in sorted(alphas.items()) if value != alpha},
    }


def _commonest(values: Any, default: Any) -> Any:
    return Counter(values).most_common(1)[0][0] if values else default
