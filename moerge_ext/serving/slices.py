"""Which rows and columns of a module this rank's share of an engine's layer holds.

Engines put modules that read the same input into one layer (q, k and v; gate and up) and share its output features
(column parallel) or its input features (row parallel) out over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..experts.module_bank import kernel_copy
from ..methods.base import Plan


@dataclass(frozen=True)
class Segment:
    """Output features that a layer holds as one piece: `size` of them here, the `start`-th and on of `whole`."""

    size: int
    start: int
    whole: int


@dataclass(frozen=True)
class Share:
    """What a rank holds of one module.

    offset, size: where its output features are in the rank's layer
    rows: [(start, size)], which of the module's O output features these are
    columns: (start, size) of its D input features, None for all of them
    """

    offset: int
    size: int
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None


def shares(
    segments: Sequence[Segment], modules: Mapping[str, int], columns: tuple[int, int] | None = None
) -> dict[str, Share]:
    """{module: its share} of a layer made of `segments`, of `modules` {name: O} in the layer's order.

    ValueError when the segments do not add up to the modules.
    """
    found, left, offset = {}, list(segments), 0
    for name, features in modules.items():
        rows, begin, seen = [], offset, 0
        while left and seen < features:
            segment = left.pop(0)
            rows.append((seen + segment.start, segment.size))
            seen += segment.whole
            offset += segment.size
        if seen != features:
            parts = " + ".join(str(segment.whole) for segment in segments)
            raise ValueError(f"its output features are {parts}, which do not add up to {dict(modules)}")
        found[name] = Share(begin, offset - begin, tuple(rows), columns)
    if left:
        raise ValueError(f"it has {sum(s.whole for s in left)} output features more than {dict(modules)}")
    return found


def share_of_plan(plan: Plan, share: Share, *, adds_bias: bool = True) -> Plan:
    """The plan's tensors for one rank; the very same where the rank holds everything.

    adds_bias: False on the ranks whose sum already has the experts' output biases from another.
    """
    features = plan.lora_B.shape[1]
    if share.rows != ((0, features),):
        ids = torch.cat([torch.arange(start, start + size) for start, size in share.rows]).to(plan.lora_B.device)
        bias = None if plan.lora_bias is None else plan.lora_bias[:, ids].contiguous()
        plan = replace(plan, lora_B=kernel_copy(plan.lora_B[:, ids]), lora_bias=bias)
    if share.columns not in (None, (0, plan.lora_A.shape[2])):
        start, size = share.columns
        gates = None if plan.gates is None else _columns(plan.gates, start, size)
        plan = replace(plan, lora_A=kernel_copy(plan.lora_A[:, :, start : start + size]), gates=gates)
    return plan if adds_bias else replace(plan, lora_bias=None)


def _columns(gates: Tensor, start: int, size: int) -> Tensor:
    return gates[:, start : start + size].contiguous()
