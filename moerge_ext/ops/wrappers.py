"""The ops: typed wrappers, fake kernels and autograd around `torch.ops.moerge`. All else goes through this file.

T tokens, D in features, O out features, E experts, K selected per token, R rank, N rows (sequences). Every op takes
float16, bfloat16, float32 and float64 in any mix and accumulates in float32 (float64 when an input is float64), runs
under `torch.compile(fullgraph=True)` and autocast (which casts nothing inside), and is deterministic: the same inputs
give the same bits, on the CPU for any number of threads. Wrong shapes, dtypes and values raise ValueError.
`moerge_ext.reference` holds the same functions in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import autograd  # noqa: F401  (registers the fake kernels and the gradients)
from .calls import watched
from .options import APPLY, BRANCH, ROUTE, TENSORS, ApplyOptions, BranchOptions, RouteOptions, documented, filled

_ops = torch.ops.moerge
# for callers that count microseconds: see `call`
ROUTED_LORA_, ROUTED_LINEAR_Y = watched(_ops.routed_lora_.default), watched(_ops.routed_linear_y.default)
_ROUTE, _ROUTED_LORA = watched(_ops.route.default), watched(_ops.routed_lora.default)
_ROUTED_LINEAR = watched(_ops.routed_linear.default)
_LORA_APPLY, _LORA_APPLY_ = watched(_ops.lora_apply.default), watched(_ops.lora_apply_.default)
_PACK_EXPERTS, _MIX_LOG_PROBS = watched(_ops.pack_experts.default), watched(_ops.mix_log_probs.default)
# All that the Python kernel of torch.library.register_autograd does when no gradient is wanted. Done in `call`, that
# kernel is never entered: 11 to 17 microseconds less per call (a tiny routed_linear of one token on a CPU: 31, not 47).
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def has_kernels(device_type: str) -> bool:
    """Whether this build computes on devices of a type ("cpu", "cuda")."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("moerge::routed_lora", key)


def call(op, *args):
    """Runs an op of `torch.ops.moerge`; its argument errors become ValueError, a device without kernels is named."""
    if torch.compiler.is_compiling():
        return op(*args)
    # torch would drop the tangents of an op without a forward-mode rule and say nothing
    if forward_ad._current_level >= 0 and _has_tangent(args):
        raise ValueError(
            f"moerge::{_name(op)}: forward-mode differentiation (jvp) is not supported; use moerge_ext.reference for it"
        )
    try:
        # in inference mode torch itself leaves autograd's kernels out
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return op(*args)
        with _below_autograd():
            return op(*args)
    except RuntimeError as error:
        raise explained(error, op, args) from None


def explained(error: RuntimeError, op, args: tuple) -> Exception:
    """What to raise for an error that an op has raised."""
    if isinstance(error, NotImplementedError):
        device = next((a.device.type for a in args if isinstance(a, Tensor) and not a.is_cpu), "cpu")
        return ValueError(
            f"moerge::{_name(op)}: this build has no kernels for tensors on '{device}'; "
            f'move them to the CPU, or use moerge_ext.reference (patch(..., backend="reference"))'
        )
    message = str(error)
    return ValueError(message.partition("\n")[0]) if message.startswith("moerge::") else error


def _name(op) -> str:
    return op.__name__.split(".")[0]


def _has_tangent(args: tuple) -> bool:
    return any(forward_ad.unpack_dual(a).tangent is not None for a in args if isinstance(a, Tensor))


def _refuse_grad(op: str, why: str, options: Mapping[str, Any], *tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    inputs = (*tensors, *(options.get(name) for name in TENSORS))
    if any(t is not None and t.requires_grad for t in inputs):
        raise ValueError(
            f"moerge::{op}: {why}, but grad mode is on and an input requires grad; "
            "call it under torch.no_grad() or torch.inference_mode()"
        )


def _refuse_packed(op: str, options: Mapping[str, Any], *tensors: Tensor | None) -> None:
    if options.get("packed") is not None:
        _refuse_grad(op, "packed is for inference", options, *tensors)


def _mark_written(tensor: Tensor) -> None:
    """So that autograd notices when the tensor was saved for backward; a compiled graph knows by itself."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


@documented(RouteOptions)
def route(x: Tensor, gates: Tensor, **options: Unpack[RouteOptions]) -> tuple[Tensor, Tensor]:
    """Scores all experts for every token and keeps the best.

        score_te = f(norm(x_t) . g_e) * scale + bias[row(t), e]

    (PHATGOOSE, arXiv 2402.05859, section 3, with norm = standardize and scale = 1/sqrt(D); Arrow, arXiv 2405.11157,
    with f = abs and norm = none; GLIDER, arXiv 2410.07172, section 4.2, adds the bias.)

    Args:
        x: [T,D] inputs of the layer.
        gates: [E,D], used as given: standardize or scale them beforehand as the method asks. On the CPU fastest when
            E is contiguous (strides (1, E)) for more than 8 experts, else when D is.
        {options}

    Returns:
        weights [T,K] float32 (float64 for float64 x) and experts [T,K] int32, best first, ties to the lower id, NaN
        scores last. An unused slot (too few eligible experts, or cut by top_p) has weight exactly 0 and no gradient.
        Differentiable in x, gates and bias.
    """
    return call(_ROUTE, x, gates, *filled(ROUTE, options).values())


@documented(ApplyOptions)
def lora_apply(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    weights: Tensor,
    experts: Tensor,
    **options: Unpack[ApplyOptions],
) -> Tensor:
    """Adds the selected experts to the output of a linear layer.

        y_t = base_t + sum_k w_tk (B_e A_e x_t + bias_e),  e = experts[t,k]
        factored: y_t = base_t + (sum_k w_tk B_e)(sum_k w_tk A_e) x_t + sum_k w_tk bias_e

    Args:
        base: [T,O], the layer's own output.
        x: [T,D].
        lora_a: [E,R,D]. Fastest when R is contiguous (strides (R*D, 1, R)), as in a bank.
        lora_b: [E,O,R], the LoRA scaling folded in. Fastest when O is contiguous (strides (R*O, 1, O)).
        weights: [T,K] or [N,K]; an expert whose weight is exactly 0 changes nothing, whatever its factors hold (its
            weight still has a gradient).
        experts: int32 like weights, ids in [0, E).
        {options}

    Returns:
        y [T,O] in base's dtype. Differentiable in base, x, lora_a, lora_b, weights and lora_bias.
    """
    _refuse_packed("lora_apply", options, base, x, lora_a, lora_b, weights)
    return call(_LORA_APPLY, base, x, lora_a, lora_b, weights, experts, *filled(APPLY, options).values())


@documented(ApplyOptions)
def lora_apply_(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    weights: Tensor,
    experts: Tensor,
    **options: Unpack[ApplyOptions],
) -> None:
    """`lora_apply` written into base. Inference only: ValueError when grad mode is on and an input requires grad."""
    _refuse_grad("lora_apply_", "it writes in place", options, base, x, lora_a, lora_b, weights)
    call(_LORA_APPLY_, base, x, lora_a, lora_b, weights, experts, *filled(APPLY, options).values())
    _mark_written(base)


@documented(BranchOptions)
def routed_lora(
    base: Tensor, x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Unpack[BranchOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """`route(x, gates, ...)` and `lora_apply` with its result, in one call.

    Arguments as there. Returns y [T,O] in base's dtype, weights [T,K] and experts [T,K] int32. Differentiable in base,
    x, gates, lora_a, lora_b, bias and lora_bias (and through weights).
    """
    _refuse_packed("routed_lora", options, base, x, gates, lora_a, lora_b)
    return call(_ROUTED_LORA, base, x, gates, lora_a, lora_b, *filled(BRANCH, options).values())


@documented(BranchOptions)
def routed_lora_(
    base: Tensor, x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Unpack[BranchOptions]
) -> None:
    """`routed_lora` written into base; what the router chose is not returned.

    base and x may have any number of dimensions, [..., O] and [..., D], when their rows lie at equal distances: when
    they are contiguous, or slices of the columns of such a tensor. They are read and written where they are. Inference
    only: ValueError when grad mode is on and an input requires grad.
    """
    _refuse_grad("routed_lora_", "it writes in place", options, base, x, gates, lora_a, lora_b)
    call(ROUTED_LORA_, base, x, gates, lora_a, lora_b, *filled(BRANCH, options).values())
    _mark_written(base)


@documented(BranchOptions)
def routed_lora_ways(
    base: Tensor, x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Unpack[BranchOptions]
) -> list[str]:
    """Which kernels `routed_lora` would run for these arguments, and why not faster ones: lines for people to read.

    Arguments as there. Computes nothing.
    """
    with torch.no_grad():
        said = call(_ops.routed_lora_ways.default, base, x, gates, lora_a, lora_b, *filled(BRANCH, options).values())
    return bytes(said.tolist()).decode().splitlines()


@documented(BranchOptions)
def routed_linear(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    gates: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    **options: Unpack[BranchOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """A linear layer and its routed experts: `routed_lora` with base = x weight^T + linear_bias.

        y_t = W x_t + b + sum_k w_tk (B_e A_e x_t + bias_e),  w, e = route(x, gates, ...)

    One launch on CUDA for one token where the shapes allow, and on a CPU with AVX2 products of its own for up to 16
    tokens (but float64); else torch's linear. The branch is added to that result, which then is rounded to y's dtype
    twice.

    Args:
        x: [T,D], or [...,D] when its rows lie at equal distances, as in a contiguous tensor; T counts all tokens.
        weight: [O,D], of x's dtype.
        linear_bias: [O] of x's dtype, or None.
        The others as in `routed_lora`.

    Returns:
        y [T,O] or [...,O] in x's dtype, weights [T,K] and experts [T,K] int32. Differentiable in x, weight,
        linear_bias, gates, lora_a, lora_b, bias and lora_bias (and through weights).
    """
    _refuse_packed("routed_linear", options, x, weight, linear_bias, gates, lora_a, lora_b)
    return call(_ROUTED_LINEAR, x, weight, linear_bias, gates, lora_a, lora_b, *filled(BRANCH, options).values())


def pack_experts(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """A kernel-ready copy of a bank for `packed=`: lora_a [E,R,D] and lora_b [E,O,R] of one dtype -> [E, R*D + R*O].

    Row e holds the transpose of A_e and then that of B_e, each row by row. Not differentiable.
    """
    with torch.no_grad():
        return call(_PACK_EXPERTS, lora_a, lora_b)


def mix_log_probs(logits: Tensor, weights: Tensor) -> Tensor:
    """Log of the weighted mean of K next-token distributions (PELMo, ICIC 2024, eq. 4), computed in log space.

        out[n,v] = log( sum_k w_nk softmax(logits[k,n])_v / sum_k w_nk )

    Args:
        logits: [K,N,V].
        weights: [N,K], not negative; a weight of exactly 0 is skipped: its logits are not read and take no gradient.
            They need not sum to 1. A row of zeros gives -inf.

    Returns:
        [N,V] float32 (float64 for float64 logits). Differentiable in logits and weights.
    """
    return call(_MIX_LOG_PROBS, logits, weights)
