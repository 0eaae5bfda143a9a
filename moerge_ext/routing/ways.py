"""Which way a routed layer takes, and why not a faster one. From fast to slow:

    fused     base layer and branch are one op
    short     torch's linear, then the branch written into its result
    in place  the base layer as it is called, then the branch written into its result
    apart     the base layer as it is called, then the branch in a result of its own

Each `against_...` returns the reasons against a way, none where it is taken: RoutedLinear decides by them, `explain`
prints them. They run at every forward of every layer, so they read plain dictionaries and make texts only where there
is a reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_hooks

from .. import ops
from ..files.counting import counted
from .layers import execution_device
from .state import Request

# Where a plain base layer and its branch are one op, whatever the number of tokens. A guess, not measured on a GPU yet.
FUSED_DEVICES = {"cuda"}
# On a CPU they are for up to so many tokens and a weight of so many numbers, which the op multiplies by itself: figures
# in csrc/cpu/linear.h.
FEW_TOKENS, LARGE_WEIGHT = 16, 1 << 16
LINEAR_FORWARD = nn.Linear.forward
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FUSED, SHORT, IN_PLACE, APART = "fused", "short", "in place", "apart"
MEANING = {
    FUSED: "base layer and branch in one op",
    SHORT: "torch's linear, the branch written into its result",
    IN_PLACE: "the base layer as it is called, the branch written into its result",
    APART: "the base layer as it is called, the branch in a result of its own",
}


def against_kept(layer: nn.Module, request: Request) -> list[str]:
    """Against op arguments that are made once and kept from call to call. `layer` is a RoutedLinear."""
    reasons = []
    if layer.route_options is None:
        reasons.append(layer.unrouted)
    if layer.backend != "native":
        reasons.append(f'backend="{layer.backend}": plain torch in place of the kernels')
    if layer.needs_bias:
        bias = request.bias
        if bias is None:
            reasons.append("the method adds affinities of the query, and none are set")
        elif layer.gates is not None and bias.device != layer.gates.device:
            # a copy on the layer's device would not see what is written into it
            reasons.append(
                f"the query's affinities are on {bias.device}, the layer on {layer._buffers['gates'].device}"
            )
    return reasons


def against_short(base: nn.Module, x: Tensor, request: Request) -> list[str]:
    """Against torch's linear in place of the call of the base layer, with the branch written into its result."""
    inner, reasons = base.__dict__, []
    if torch.is_grad_enabled():
        reasons.append("grad mode is on")
    if type(base) is not nn.Linear:
        reasons.append(f"the base layer is a {type(base).__name__}, not an nn.Linear")
        return reasons
    if nn.Linear.forward is not LINEAR_FORWARD or "forward" in inner or inner.get("_compiled_call_impl") is not None:
        reasons.append("the base layer's forward was replaced")
    if "weight" not in inner["_parameters"] or "bias" not in inner["_parameters"]:
        reasons.append("the base layer's weight or bias is not a parameter of its own")
    if inner["_forward_hooks"] or inner["_forward_pre_hooks"]:
        reasons.append("the base layer has forward hooks")
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        reasons.append("torch has forward hooks for all modules")
    if request.trace is not None:
        reasons.append("handle.record() is on")
    if not request.enabled:
        reasons.append("the experts are switched off (handle.disabled())")
    if forward_ad._current_level >= 0:
        reasons.append("inside of forward-mode differentiation")
    if not x.is_contiguous():
        reasons.append("the input is not contiguous")
    return reasons


def against_fused(x: Tensor, weight: Tensor) -> list[str]:
    """Against one op for a base layer that is plain and its branch."""
    reasons = []
    if x.device.type == "cpu" and "cpu" not in FUSED_DEVICES and x.numel() > FEW_TOKENS * x.shape[-1]:
        reasons.append(f"there are more than {FEW_TOKENS} tokens")
    reasons += against_fused_weight(weight)
    if weight.device != x.device:
        reasons.append(f"the weight is on {weight.device}, the input on {x.device}")
    if weight.dtype != x.dtype:
        reasons.append(f"the weight is {_name(weight.dtype)}, the input {_name(x.dtype)}")
    if torch.is_autocast_enabled(x.device.type):
        reasons.append("autocast is on")
    return reasons


def against_fused_weight(weight: Tensor) -> list[str]:
    """The part of `against_fused` that a weight decides: on a CPU, where torch's linear is as fast as the op's own."""
    reasons, device = [], weight.device.type
    if device == "cpu" and device not in FUSED_DEVICES:
        if weight.dtype is torch.float64:
            reasons.append("the weight is float64")
        if weight.numel() < LARGE_WEIGHT:
            reasons.append(f"the weight has fewer than {LARGE_WEIGHT} numbers, and stays in the caches")
    elif device not in FUSED_DEVICES:
        reasons.append(f"there is no such kernel for {device}")
    if type(weight) is not nn.Parameter:
        reasons.append(f"the weight is a {type(weight).__name__}")
    if weight.layout is not torch.strided:
        reasons.append(f"the weight is stored as {_name(weight.layout)}")
    return reasons


def most_fused(weight: Tensor, features: int) -> float:
    """Up to how many numbers of x [..., features] `against_fused` has nothing against in the rest; -1: never."""
    if against_fused_weight(weight):
        return -1
    return math.inf if weight.device.type in FUSED_DEVICES else FEW_TOKENS * features


def against_in_place(layer: nn.Module, request: Request) -> list[str]:
    """Against writing the branch into what the base layer returned."""
    reasons = []
    if torch.is_grad_enabled():
        reasons.append("grad mode is on")
    # a hook may have kept the result
    if layer.base_layer._forward_hooks or module_hooks._global_forward_hooks:
        reasons.append("a forward hook may keep the base layer's result")
    if request.trace is not None and layer.route_options is not None:
        reasons.append("handle.record() is on")
    return reasons


def against_fast_kernels(layer: nn.Module) -> list[str]:
    """Against the kernels of a GPU that want tokens and experts in one type; any mix is right, and slow."""
    base, bank = getattr(getattr(layer.base_layer, "weight", None), "dtype", None), layer.lora_A
    if bank.device.type == "cpu" or base == bank.dtype or base not in FLOATS:
        return []
    ours, theirs = _name(bank.dtype), _name(base)
    return [
        f"the experts are {ours} and the model is {theirs}: on a GPU that is slow. "
        f"load_experts(..., dtype=torch.{theirs}) makes them alike, and rounds them to it."
    ]


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


@dataclass(frozen=True)
class Way:
    """The way of layers of one kind: how many they are, what they are, and the reasons against every faster way."""

    modules: tuple[str, ...]
    layer: str
    way: str
    against: tuple[tuple[str, tuple[str, ...]], ...]  # (a faster way, reasons), fast to slow
    kernels: tuple[tuple[int, tuple[str, ...]], ...]  # (tokens T, what the ops say of their kernels)

    def __str__(self) -> str:
        lines = [f"{len(self.modules)} x {self.layer}: {MEANING.get(self.way, self.way)}"]
        lines += [f"    not {MEANING.get(way, way)}: {'; '.join(reasons)}" for way, reasons in self.against]
        for tokens, said in self.kernels:
            lines.append(("    ops: " if len(self.kernels) == 1 else f"    T = {tokens}: ") + "; ".join(said))
        return "\n".join(lines)


class Explanation(tuple):
    """The ways of all routed layers of a model, one `Way` per kind of layer; printed as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def way_of(layer: nn.Module, x: Tensor) -> tuple[str, list[tuple[str, list[str]]]]:
    """(the way that `layer` takes for the input x [..., D] at present, the reasons against every faster one)."""
    base, request = layer.base_layer, layer.state.current()
    if why := getattr(type(layer), "why_apart", None):
        return APART, [(IN_PLACE, [why])]
    kept = against_kept(layer, request)
    short = kept + against_short(base, x, request)
    weight = getattr(base, "weight", None)
    fused = short + (against_fused(x, weight) if isinstance(weight, Tensor) else [])
    against = []
    for way, reasons in ((FUSED, fused), (SHORT, short), (IN_PLACE, against_in_place(layer, request))):
        if not reasons:
            return way, against
        against.append((way, reasons))
    return APART, against


def explain(layers: Iterable[nn.Module], *, grad: bool = False) -> Explanation:
    """The ways of routed layers for tokens of their weights' type, in inference or (`grad`) with gradients."""
    kinds: dict[tuple, list[str]] = {}
    for layer in layers:
        weight = getattr(layer.base_layer, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATS else torch.get_default_dtype()
        with torch.set_grad_enabled(grad):
            x = torch.empty(1, layer.in_features, dtype=dtype, device=execution_device(layer))
            way, against = way_of(layer, x)
            kernels = _kernels(layer, x)
        if slow := against_fast_kernels(layer):
            against.append(("the fast kernels", slow))
        said = tuple((faster, tuple(reasons)) for faster, reasons in against)
        kinds.setdefault((_described(layer, x), way, said, kernels), []).append(layer.name)
    return Explanation(Way(tuple(names), *kind) for kind, names in kinds.items())


def _kernels(layer: nn.Module, x: Tensor) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """What the ops say of their kernels for one token of a layer and for many, and which way many take if another."""
    if layer.route_options is None or layer.backend != "native" or hasattr(type(layer), "why_apart"):
        return ()
    options = layer.route_options | {name: getattr(layer, name) for name in ("mask", "lora_bias", "factored")}
    found = []
    for tokens in (1, 512):
        many = x.expand(tokens, -1).contiguous()
        base = many.new_empty(tokens, layer.lora_B.shape[1])
        said = tuple(ops.routed_lora_ways(base, many, layer.gates, layer.lora_A, layer.lora_B, **options))
        way = way_of(layer, many)[0]
        found.append((tokens, said if way == way_of(layer, x)[0] else (MEANING[way], *said)))
    return tuple(found[:1] if found[0][1] == found[1][1] else found)


def _described(layer: nn.Module, x: Tensor) -> str:
    base, weight = layer.base_layer, getattr(layer.base_layer, "weight", None)
    special = f" of {type(weight).__name__}" if isinstance(weight, Tensor) and type(weight) is not nn.Parameter else ""
    slots, rank, _ = layer.lora_A.shape
    spare = f" (and {slots - layer.num_experts} spare slots)" if slots > layer.num_experts else ""
    return (
        f"{type(base).__name__}{special} {layer.in_features} -> {layer.out_features}, {_name(x.dtype)} on "
        f"{x.device.type}, {counted(layer.num_experts, 'expert')}{spare} of rank {rank} in {_name(layer.lora_A.dtype)}"
    )
