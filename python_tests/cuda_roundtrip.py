"""`pytest --cuda`: every op that a test calls on the CPU runs on the GPU instead.

The CPU kernels are replaced by functions that move the arguments to the GPU, call the op there and move the results
back, so that the op tests, written for the CPU, are tests of the CUDA kernels too.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPS = (
    "route", "route_backward", "lora_apply", "lora_apply_backward", "routed_lora", "routed_linear", "pack_experts",
    "mix_log_probs", "mix_log_probs_backward",
)  # fmt: skip
_library: list[torch.library.Library] = []  # what it registers lasts as long as it does


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values on another device in the same layout: strides, offset and what lies between."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    if tensor.numel() == 0:
        return tensor.to(device)
    flat = tensor.detach().as_strided((span,), (1,), tensor.storage_offset()).to(device, copy=True)
    return flat.as_strided(tensor.shape, tensor.stride())


def round_trip(op, device: torch.device):
    def call(*args):
        there = [moved(a, device) if isinstance(a, Tensor) else a for a in args]
        out = op(*there)
        if isinstance(out, Tensor):
            return moved(out, torch.device("cpu"))
        return tuple(moved(o, torch.device("cpu")) for o in out)

    return call


def in_place(op, device: torch.device):
    def call(base, *args):
        target = moved(base, device)
        op(target, *(moved(a, device) if isinstance(a, Tensor) else a for a in args))
        base.copy_(target)

    return call


def install(device: torch.device) -> None:
    """Replaces the CPU kernels in this process."""
    library = torch.library.Library("moerge", "IMPL")
    for name in OPS:
        library.impl(name, round_trip(getattr(torch.ops.moerge, name).default, device), "CPU")
    for name in ("lora_apply_", "routed_lora_"):
        library.impl(name, in_place(getattr(torch.ops.moerge, name).default, device), "CPU")
    _library.append(library)
