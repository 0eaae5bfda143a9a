"""The ops in plain torch: the definition of correct. Same signatures as `moerge_ext.ops`, any device, differentiable.

Written to be read, not to be fast. Arithmetic is float32, or float64 for float64 inputs; autocast casts nothing inside,
as in the ops. T tokens, D in features, O out features, E experts, K selected per token, R rank, N rows (sequences).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from .options import APPLY, BRANCH, ROUTE, ApplyOptions, BranchOptions, RouteOptions, documented, filled

EPS = 1e-5
TINY = 1e-12


def _casting_nothing(function: Callable) -> Callable:
    """`function`, whose first argument is a tensor, outside of autocast."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _row_of_token(tokens: int, n_rows: int, rows: Tensor | None, device: torch.device) -> Tensor:
    """[T] int64: the row (sequence) of each token."""
    if rows is not None:
        return rows.long()
    if tokens % n_rows if n_rows else tokens:
        raise ValueError(
            f"the number of tokens T={tokens} must be a multiple of N={n_rows} rows, or rows must be given"
        )
    return torch.arange(tokens, device=device) // max(1, tokens // max(1, n_rows))


def _normalized(x: Tensor, normalize: str) -> Tensor:
    if normalize == "standardize":
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    if normalize == "unit":
        return x / x.norm(dim=-1, keepdim=True).clamp_min(TINY)
    if normalize == "none":
        return x
    raise ValueError(f"normalize must be 'standardize', 'unit' or 'none', got {normalize!r}")


def _softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept entries of the last dimension, exactly 0 elsewhere (and everywhere if none is kept)."""
    highest = scores.detach().masked_fill(~keep, -torch.inf).amax(-1, keepdim=True)
    highest = torch.where(keep.any(-1, keepdim=True), highest, torch.zeros_like(highest))
    exponent = torch.where(keep, scores, highest) - highest
    parts = torch.where(keep, exponent.exp(), torch.zeros_like(scores))
    total = parts.sum(-1, keepdim=True)
    return torch.where(keep, parts / torch.where(keep.any(-1, keepdim=True), total, torch.ones_like(total)), parts)


def _ranking(scores: Tensor, eligible: Tensor) -> Tensor:
    """[T,E] ids: eligible numbers by descending score (ties to the lower id), eligible NaN, the masked."""
    nan = scores.isnan()
    order = _order(scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), descending=True)
    kind = torch.where(eligible, nan.int(), torch.full_like(nan, 2, dtype=torch.int32))
    return order.gather(-1, _order(kind.gather(-1, order)))


def _order(keys: Tensor, descending: bool = False) -> Tensor:
    """The ids that sort the last dimension, ties to the lower id."""
    if not torch.compiler.is_exporting():
        return torch.argsort(keys, dim=-1, descending=descending, stable=True)
    # ONNX has no stable sort: a key's place is the number of those that come before it, out of [..., E, E] pairs
    ids = torch.arange(keys.shape[-1], device=keys.device)
    mine, other = keys[..., :, None], keys[..., None, :]
    ahead = other > mine if descending else other < mine
    place = (ahead | ((other == mine) & (ids[None, :] < ids[:, None]))).sum(-1)
    return torch.zeros_like(place).scatter(-1, place, ids.expand(place.shape))


def _slot_weights(weighting: str, scores: Tensor, kept: Tensor, share: Tensor) -> Tensor:
    """[T,K]: the weight of each slot, 0 where it is not kept; `share` is the softmax over all unmasked experts."""
    if weighting == "softmax":
        weights = _softmax(scores, kept)
    elif weighting == "softmax_all":
        weights = share
    elif weighting == "sigmoid":
        weights = scores.sigmoid()
    elif weighting == "score":
        weights = scores
    else:
        raise ValueError(f"weighting must be 'softmax', 'softmax_all', 'sigmoid' or 'score', got {weighting!r}")
    return torch.where(kept, weights, torch.zeros_like(weights))


@documented(RouteOptions)
@_casting_nothing
def route(x: Tensor, gates: Tensor, **options: Unpack[RouteOptions]) -> tuple[Tensor, Tensor]:
    """See `moerge_ext.ops.route`."""
    top_k, normalize, absolute, scale, bias, rows, mask, top_p, weighting = filled(ROUTE, options).values()
    tokens, features = x.shape
    experts = gates.shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in [1, E={experts}], got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    acc = _accumulator(x)
    scores = _normalized(x.to(acc), normalize) @ gates.to(acc).T
    if absolute:
        scores = scores.abs()
    if scale is None:
        scale = features**-0.5 if normalize == "standardize" else 1.0
    scores = scores * scale
    n_rows = next((m.shape[0] for m in (bias, mask) if m is not None and m.dim() == 2), 0)
    row = _row_of_token(tokens, n_rows or 1, rows if n_rows else None, x.device)
    if bias is not None:
        scores = scores + bias.to(acc)[row]
    eligible = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        eligible = mask.expand(tokens, experts) if mask.dim() == 1 else mask[row]

    order = _ranking(scores.detach(), eligible)
    top = order[:, :top_k]
    kept = eligible.gather(-1, top)
    everyone = _softmax(scores, eligible)
    if top_p is not None:
        share = everyone.detach().gather(-1, top)
        before = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(-1)[:, :-1]], dim=-1)
        kept = kept & ~(before >= top_p)

    weights = _slot_weights(weighting, scores.gather(-1, top), kept, everyone.gather(-1, top))

    # unused slots carry the lowest ids that no kept slot has
    used = torch.zeros_like(eligible).scatter_(-1, top, kept)
    unused = _order(used.int())
    slot = torch.arange(top_k, device=x.device) - kept.sum(-1, keepdim=True)
    ids = torch.where(kept, top, unused.gather(-1, slot.clamp_min(0)))
    return weights, ids.int()


@documented(ApplyOptions)
@_casting_nothing
def lora_apply(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    weights: Tensor,
    experts: Tensor,
    **options: Unpack[ApplyOptions],
) -> Tensor:
    """See `moerge_ext.ops.lora_apply`. `packed` is ignored: it is a copy of lora_a and lora_b."""
    lora_bias, rows, factored, _ = filled(APPLY, options).values()
    if base.shape != (x.shape[0], lora_b.shape[1]):
        raise ValueError(f"base must be [T={x.shape[0]}, O={lora_b.shape[1]}], got {list(base.shape)}")
    acc = _accumulator(base, x, lora_a, lora_b)
    tokens, n_experts = x.shape[0], lora_a.shape[0]
    row = _row_of_token(tokens, weights.shape[0], rows, x.device)
    # one weight per token and expert; a slot of weight 0 takes nothing from its expert
    dense = weights.to(acc).new_zeros(tokens, n_experts)
    dense = dense.scatter_add(1, experts.long()[row], weights.to(acc)[row])
    used = torch.zeros_like(dense).scatter_add(1, experts.long()[row], (weights.detach() != 0).to(acc)[row]) != 0
    x = x.to(acc)
    y = base.to(acc)
    anyone = used.any(0)
    shrunk = [x @ _read(lora_a[e], anyone[e]).to(acc).T for e in range(n_experts)]
    if factored:
        mean = sum(_weighted(dense[:, e], used[:, e], shrunk[e]) for e in range(n_experts))
        shrunk = [mean] * n_experts
    for e in range(n_experts):
        delta = shrunk[e] @ _read(lora_b[e], anyone[e]).to(acc).T
        if lora_bias is not None:
            delta = delta + lora_bias[e].to(acc)
        y = y + _weighted(dense[:, e], used[:, e], delta)
    return y.to(base.dtype)


def _read(factor: Tensor, anyone: Tensor) -> Tensor:
    """The factor; without its NaN and inf where no token uses the expert, lest 0 * NaN reach the other gradients."""
    return torch.where(anyone, factor, factor.detach().nan_to_num(0.0, 0.0, 0.0))


def _weighted(weight: Tensor, used: Tensor, value: Tensor) -> Tensor:
    """weight * value per token; where unused the value is not taken (NaN included), but d/dweight stays true."""
    value = torch.where(used[:, None], value, value.detach().nan_to_num(0.0, 0.0, 0.0))
    return weight[:, None] * value


@documented(ApplyOptions)
@_casting_nothing
def lora_apply_(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    weights: Tensor,
    experts: Tensor,
    **options: Unpack[ApplyOptions],
) -> None:
    """See `moerge_ext.ops.lora_apply_`."""
    base.copy_(lora_apply(base, x, lora_a, lora_b, weights, experts, **options))


@documented(BranchOptions)
@_casting_nothing
def routed_lora(
    base: Tensor, x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Unpack[BranchOptions]
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moerge_ext.ops.routed_lora`."""
    options = filled(BRANCH, options)
    weights, experts = route(x, gates, **{name: options[name] for name in ROUTE})
    applied = {name: options[name] for name in APPLY if name not in ROUTE}
    return lora_apply(base, x, lora_a, lora_b, weights, experts, **applied), weights, experts


@documented(BranchOptions)
@_casting_nothing
def routed_lora_(
    base: Tensor, x: Tensor, gates: Tensor, lora_a: Tensor, lora_b: Tensor, **options: Unpack[BranchOptions]
) -> None:
    """See `moerge_ext.ops.routed_lora_`."""
    y, *_ = routed_lora(base.flatten(0, -2), x.flatten(0, -2), gates, lora_a, lora_b, **options)
    base.copy_(y.view(base.shape))


@documented(BranchOptions)
@_casting_nothing
def routed_linear(
    x: Tensor,
    weight: Tensor,
    linear_bias: Tensor | None,
    gates: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    **options: Unpack[BranchOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """See `moerge_ext.ops.routed_linear`."""
    base = torch.nn.functional.linear(x, weight, linear_bias)
    y, weights, experts = routed_lora(base.flatten(0, -2), x.flatten(0, -2), gates, lora_a, lora_b, **options)
    return y.view(base.shape), weights, experts


def pack_experts(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """See `moerge_ext.ops.pack_experts`."""
    return torch.cat([lora_a.transpose(1, 2).flatten(1), lora_b.transpose(1, 2).flatten(1)], dim=1)


@_casting_nothing
def mix_log_probs(logits: Tensor, weights: Tensor) -> Tensor:
    """See `moerge_ext.ops.mix_log_probs`."""
    acc = _accumulator(logits)
    w = weights.to(acc).T[:, :, None]  # [K,N,1]
    used = w != 0
    log_probs = torch.where(used, logits.to(acc), torch.zeros_like(logits, dtype=acc)).log_softmax(-1)
    terms = torch.where(used, log_probs + torch.where(used, w, torch.ones_like(w)).log(), -torch.inf)
    total = torch.where(used, w, torch.zeros_like(w)).sum(0)
    mixed = terms.logsumexp(0) if logits.shape[0] else terms.new_full(terms.shape[1:], -torch.inf)
    return mixed - torch.where(total == 0, torch.ones_like(total), total).log()
