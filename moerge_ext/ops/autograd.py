"""Fake kernels and gradients of the ops, registered with torch.

Backward ops are ops too; differentiating them is refused.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.library import register_autograd

from ..native.loading import load_kernels
from .options import BRANCH, ROUTE, TENSORS

load_kernels()
_ops = torch.ops.moerge


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def register_fake(name: str):
    """torch's, with a check: a meta tensor among others selects the fake kernel, which returns memory nobody wrote."""

    def register(fake):
        @functools.wraps(fake)
        def checked(*args):
            devices = {a.device for a in args if isinstance(a, Tensor)}
            if len(devices) > 1:
                found = ", ".join(sorted(map(str, devices)))
                raise RuntimeError(f"{name}: all tensors must be on one device, got {found}")
            return fake(*args)

        return torch.library.register_fake(name)(checked)

    return register


def _bits(needs: list[bool]) -> int:
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def _needs(ctx, *positions: int) -> list[bool]:
    """Which inputs want a gradient. torch leaves trailing arguments that have their default out of the record."""
    wanted = ctx.needs_input_grad
    return [i < len(wanted) and wanted[i] for i in positions]


def _given(grad: Tensor, needed: bool) -> Tensor | None:
    return grad if needed else None


def _maybe(like: Tensor, shape: tuple[int, ...], needed: bool) -> Tensor:
    return like.new_empty(shape if needed else (0,))


# ---- route -------------------------------------------------------------------------------------------------------


@register_fake("moerge::route")
def _route_fake(x, gates, top_k=2, *options):
    shape = (x.shape[0], top_k)
    return x.new_empty(shape, dtype=_wide(x)), x.new_empty(shape, dtype=torch.int32)


@register_fake("moerge::route_backward")
def _route_backward_fake(grad_weights, weights, experts, x, gates, needs, *options):
    bias = dict(zip(ROUTE, options, strict=False)).get("bias")
    bias_like = x if bias is None else bias
    return (
        _maybe(x, x.shape, needs & 1),
        _maybe(gates, gates.shape, needs & 2),
        _maybe(bias_like, bias_like.shape, bias is not None and needs & 4),
    )


def _keep(ctx, tensors: tuple[Tensor, ...], options: dict) -> None:
    """For backward: tensors, and options by their names."""
    ctx.options = {name: value for name, value in options.items() if name not in TENSORS}
    ctx.tensor_names = [name for name in options if name in TENSORS and name != "packed"]
    ctx.save_for_backward(*tensors, *(options[name] for name in ctx.tensor_names))
    ctx.set_materialize_grads(False)


def _kept(ctx, count: int) -> tuple[list[Tensor], dict]:
    """The `count` tensors and the options that `_keep` was given."""
    saved = list(ctx.saved_tensors)
    return saved[:count], ctx.options | dict(zip(ctx.tensor_names, saved[count:], strict=True))


def _route_setup(ctx, inputs, output):
    x, gates, *options = inputs
    _keep(ctx, (x, gates, *output), dict(zip(ROUTE, options, strict=True)))


def _route_grads(grad, x, gates, chosen, options, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(grad_x, grad_gates, grad_bias) from the gradient of the weights; chosen: weights, experts; `needs`: which."""
    if grad is None or not any(needs):
        return None, None, None
    ordered = (options[name] for name in ROUTE)
    grads = _ops.route_backward.default(grad, *chosen, x, gates, _bits(needs), *ordered)
    return tuple(_given(g, needed) for g, needed in zip(grads, needs, strict=True))


# where the differentiable inputs stand among those of the ops, which begin with x, gates and with base, x, gates, ...
_ROUTE_INPUTS = ["x", "gates", *ROUTE]
_ROUTED_INPUTS = ["base", "x", "gates", "lora_a", "lora_b", *BRANCH]
_ROUTED = {name: _ROUTED_INPUTS.index(name) for name in ("x", "gates", "lora_a", "lora_b", "bias", "lora_bias")}


def _route_backward(ctx, grad_weights, grad_experts):
    (x, gates, *chosen), options = _kept(ctx, 4)
    at = [_ROUTE_INPUTS.index(name) for name in ("x", "gates", "bias")]
    out = [None] * len(_ROUTE_INPUTS)
    for position, grad in zip(at, _route_grads(grad_weights, x, gates, chosen, options, _needs(ctx, *at)), strict=True):
        out[position] = grad
    return tuple(out)


register_autograd("moerge::route", _route_backward, setup_context=_route_setup)


# ---- lora_apply --------------------------------------------------------------------------------------------------


@register_fake("moerge::lora_apply")
def _lora_apply_fake(base, x, lora_a, lora_b, weights, experts, lora_bias=None, *options):
    return base.new_empty(base.shape)


@register_fake("moerge::lora_apply_")
def _lora_apply_inplace_fake(base, *inputs):
    return None


@register_fake("moerge::lora_apply_backward")
def _lora_apply_backward_fake(grad_y, x, lora_a, lora_b, weights, experts, needs, lora_bias=None, *options):
    n_experts, out_features, rank = lora_b.shape
    grad_b = _maybe(lora_b, (n_experts, rank, out_features), needs & 4)
    bias_like = x if lora_bias is None else lora_bias
    return (
        _maybe(x, x.shape, needs & 1),
        _maybe(lora_a, lora_a.shape, needs & 2),
        grad_b.transpose(1, 2) if needs & 4 else grad_b,
        _maybe(weights, weights.shape, needs & 8),
        _maybe(bias_like, bias_like.shape, lora_bias is not None and needs & 16),
    )


def _lora_setup(ctx, inputs, output):
    base, x, lora_a, lora_b, weights, experts, lora_bias, rows, factored, packed = inputs
    ctx.factored = factored
    ctx.save_for_backward(x, lora_a, lora_b, weights, experts, lora_bias, rows)


def _lora_grads(grad_y, saved, factored, needs) -> tuple[Tensor | None, ...]:
    """(grad_x, grad_lora_a, grad_lora_b, grad_weights, grad_lora_bias); `needs` says which."""
    x, lora_a, lora_b, weights, experts, lora_bias, rows = saved
    if not any(needs):
        return (None,) * 5
    grads = _ops.lora_apply_backward.default(
        grad_y, x, lora_a, lora_b, weights, experts, _bits(needs), lora_bias, rows, factored
    )
    return tuple(_given(g, needed) for g, needed in zip(grads, needs, strict=True))


def _lora_backward(ctx, grad_y):
    needs = _needs(ctx, 1, 2, 3, 4, 6)
    dx, da, db, dw, dbias = _lora_grads(grad_y, ctx.saved_tensors, ctx.factored, needs)
    return _given(grad_y, ctx.needs_input_grad[0]), dx, da, db, dw, None, dbias, None, None, None


register_autograd("moerge::lora_apply", _lora_backward, setup_context=_lora_setup)


# ---- routed_lora -------------------------------------------------------------------------------------------------


@register_fake("moerge::routed_lora")
def _routed_lora_fake(base, x, gates, lora_a, lora_b, top_k=2, *options):
    return base.new_empty(base.shape), *_route_fake(x, gates, top_k)


@register_fake("moerge::routed_lora_")
def _routed_lora_inplace_fake(base, *inputs):
    return None


def _routed_setup(ctx, inputs, output):
    base, x, gates, lora_a, lora_b, *options = inputs
    _keep(ctx, (x, gates, lora_a, lora_b, *output[1:]), dict(zip(BRANCH, options, strict=True)))


def _routed_grads(grad_y, grad_weights, saved, options, needs) -> dict[str, Tensor | None]:
    """Gradients of the branch by name, from those of y [T,O] and of the weights; `needs` by name says which."""
    x, gates, lora_a, lora_b, *chosen = saved
    routed = [needs["x"], needs["gates"], needs["bias"]]
    grads = dict.fromkeys(needs)
    if grad_y is not None:
        wanted = [needs["x"], needs["lora_a"], needs["lora_b"], any(routed), needs["lora_bias"]]
        applied = (x, lora_a, lora_b, *chosen, options["lora_bias"], None)
        grads["x"], grads["lora_a"], grads["lora_b"], dweights, grads["lora_bias"] = _lora_grads(
            grad_y, applied, options["factored"], wanted
        )
        grad_weights = _sum(grad_weights, dweights)
    dx, grads["gates"], grads["bias"] = _route_grads(grad_weights, x, gates, chosen, options, routed)
    grads["x"] = _sum(grads["x"], dx)
    return grads


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _routed_backward(ctx, grad_y, grad_weights, grad_experts):
    needs = dict(zip(_ROUTED, _needs(ctx, *_ROUTED.values()), strict=True))
    grads = _routed_grads(grad_y, grad_weights, *_kept(ctx, 6), needs)
    out = [None] * len(_ROUTED_INPUTS)
    for name, at in _ROUTED.items():
        out[at] = grads[name]
    if grad_y is not None:
        out[0] = _given(grad_y, ctx.needs_input_grad[0])
    return tuple(out)


register_autograd("moerge::routed_lora", _routed_backward, setup_context=_routed_setup)


# ---- routed_linear -----------------------------------------------------------------------------------------------


def _tokens(x: Tensor) -> Tensor:
    """[..., D] -> [T,D]; one vector is one token."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


@register_fake("moerge::routed_linear")
def _routed_linear_fake(x, weight, linear_bias, gates, lora_a, lora_b, top_k=2, *options):
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return y, *_route_fake(_tokens(x), gates, top_k)


@register_fake("moerge::routed_linear_y")
def _routed_linear_y_fake(x, weight, *others):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _linear_setup(ctx, inputs, output):
    x, weight, linear_bias, gates, lora_a, lora_b, *options = inputs
    _keep(ctx, (weight, x, gates, lora_a, lora_b, *output[1:]), dict(zip(BRANCH, options, strict=True)))


def _linear_backward(ctx, grad_y, grad_weights, grad_experts):
    (weight, x, *saved), options = _kept(ctx, 7)
    at = {name: 0 if name == "x" else position + 1 for name, position in _ROUTED.items()}
    needs = dict(zip(at, _needs(ctx, *at.values()), strict=True))
    tokens = _tokens(x)
    dy = None if grad_y is None else _tokens(grad_y)
    grads = _routed_grads(dy, grad_weights, (tokens, *saved), options, needs)
    need_weight, need_bias = _needs(ctx, 1, 2)
    out = [None] * (len(_ROUTED_INPUTS) + 1)
    if dy is not None:
        grads["x"] = _sum(dy @ weight, grads["x"]) if needs["x"] else None
        out[1] = dy.mT @ tokens if need_weight else None
        out[2] = dy.sum(0) if need_bias else None
    for name, position in at.items():
        out[position] = grads[name]
    out[0] = None if grads["x"] is None else grads["x"].view(x.shape)
    return tuple(out)


register_autograd("moerge::routed_linear", _linear_backward, setup_context=_linear_setup)


# ---- pack_experts, mix_log_probs ---------------------------------------------------------------------------------


@register_fake("moerge::pack_experts")
def _pack_fake(lora_a, lora_b):
    n_experts, rank, features = lora_a.shape
    return lora_a.new_empty((n_experts, rank * features + rank * lora_b.shape[1]))


@register_fake("moerge::mix_log_probs")
def _mix_fake(logits, weights):
    return logits.new_empty(logits.shape[1:], dtype=_wide(logits))


@register_fake("moerge::mix_log_probs_backward")
def _mix_backward_fake(grad, result, logits, weights, needs):
    return _maybe(logits, logits.shape, needs & 1), _maybe(weights, weights.shape, needs & 2)


def _mix_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _mix_backward(ctx, grad):
    logits, weights, result = ctx.saved_tensors
    needs = _needs(ctx, 0, 1)
    grads = _ops.mix_log_probs_backward.default(grad, result, logits, weights, _bits(needs))
    return tuple(_given(g, needed) for g, needed in zip(grads, needs, strict=True))


register_autograd("moerge::mix_log_probs", _mix_backward, setup_context=_mix_setup)


# ---- what has no gradient ----------------------------------------------------------------------------------------


def _refuse(op: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"moerge::{op} has no gradient of its own: second derivatives (create_graph=True) are not supported. "
            "Use moerge_ext.reference for double backward."
        )

    register_autograd(f"moerge::{op}", backward)


for _name in ("route_backward", "lora_apply_backward", "mix_log_probs_backward", "pack_experts"):
    _refuse(_name)
