"""Shared by the op tests: random inputs, unusual memory layouts, and the rule for "as good as plain torch".

The truth is `moerge_ext.reference` in float64 on the same (already rounded) values:
err(ours) <= 2 * err(reference in the inputs' own dtypes) + atol.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moerge_ext import ops, reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Inputs = dict[str, Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def router(
    T: int = 33, D: int = 24, E: int = 7, x: torch.dtype = torch.float32, gates: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    return rand(T, D, seed=1, dtype=x), rand(E, D, seed=2, dtype=gates)


def lora(
    T: int = 33, D: int = 24, E: int = 7, K: int = 2, R: int = 4, O: int = 20, *, N: int | None = None,
    base: torch.dtype = torch.float32, x: torch.dtype = torch.float32, bank: torch.dtype = torch.float32,
    lora_bias: bool = False,
) -> Inputs:  # fmt: skip
    """Inputs of lora_apply by name; every token has K distinct experts."""
    n = T if N is None else N
    order = torch.rand(n, E, generator=torch.Generator().manual_seed(3)).argsort(-1)
    case = {
        "base": rand(T, O, seed=4, dtype=base),
        "x": rand(T, D, seed=5, dtype=x),
        "lora_a": (rand(E, R, D, seed=6) / max(D, 1) ** 0.5).to(bank),
        "lora_b": rand(E, R, O, seed=7, dtype=bank).transpose(1, 2),
        "weights": rand(n, K, seed=8).sigmoid(),
        "experts": order[:, :K].int().contiguous(),
    }
    if lora_bias:
        case["lora_bias"] = rand(E, O, seed=9, dtype=bank)
    return case


def double(inputs: Inputs) -> Inputs:
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, atol: float = 1e-6) -> None:
    """err(ours) <= 2 err(plain) + atol * (1 + max |truth|); NaN and inf in the same places."""
    assert ours.shape == truth.shape and ours.dtype == plain.dtype
    ours, plain = ours.double(), plain.double()
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite), "NaN or inf in other places than the truth"
    if not finite.any():
        return
    ours, plain, truth = ours[finite], plain[finite], truth[finite]
    error, allowed = (ours - truth).abs().max(), 2 * (plain - truth).abs().max()
    assert error <= allowed + atol * (1 + truth.abs().max()), f"error {error:.3g}, plain torch {allowed / 2:.3g}"


def same_experts(ours: Tensor, truth: Tensor, scores: Tensor, margin: float = 1e-4) -> None:
    """Ids are equal, or name experts whose float64 scores [T,E] are within `margin` of each other."""
    gap = scores.gather(-1, ours.long()) - scores.gather(-1, truth.long())
    clash = (ours != truth) & ~(gap.abs() <= margin)
    assert not clash.any(), f"other experts at {clash.nonzero()[:5].tolist()}"


def check_route(x, gates, **options):
    """Compares ids outside a tie margin and weights by the 2x rule; returns ours."""
    weights, experts = ops.route(x, gates, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    plain, _ = reference.route(x, gates, **options)
    truth, ids = reference.route(x.double(), gates.double(), **wide)
    every = {**wide, "top_k": gates.shape[0], "weighting": "score", "top_p": None, "mask": None}
    sorted_scores, order = reference.route(x.double(), gates.double(), **every)
    scores = torch.empty_like(sorted_scores).scatter_(-1, order.long(), sorted_scores)
    same_experts(experts, ids, scores.nan_to_num(0.0))
    assert experts.dtype == torch.int32
    assert_as_good(weights, plain, truth, atol=2e-6)
    return weights, experts


def check_lora(case, atol=2e-6, **options):
    """y of lora_apply, compared by the rule above."""
    y = ops.lora_apply(**case, **options)
    plain = reference.lora_apply(**case, **options)
    assert_as_good(y, plain, reference.lora_apply(**double(case), **options), atol)
    return y


def _wider(t: Tensor, last: int) -> Tensor:
    return t.new_full((*t.shape[:-1], last), float("nan") if t.is_floating_point() else 1)


def _row_slice(t: Tensor) -> Tensor:
    wide = _wider(t, t.shape[-1] + 5)
    wide[..., 3:-2] = t
    return wide[..., 3:-2]


def _every_other(t: Tensor) -> Tensor:
    wide = _wider(t, 2 * t.shape[-1])
    wide[..., ::2] = t
    return wide[..., ::2]


# the same values elsewhere in memory; what lies between them is NaN
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "row_slice": _row_slice,
    "every_other": _every_other,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else _every_other(t),
    "outer_last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
}


def cotangent(output: Tensor, i: int = 0) -> Tensor:
    """What `gradients` sends back through the i-th floating output: it fits into bfloat16, so that the truth and ours
    get the same numbers whatever the types of their outputs.
    """
    return rand(*output.shape, seed=90 + i, dtype=torch.bfloat16).to(output.dtype)


def gradients(
    fn: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Inputs, wanted: tuple[str, ...], **options
) -> tuple[tuple[Tensor, ...], Inputs]:
    """Outputs, and gradients by name of sum(output * cotangent) over the floating outputs."""
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in inputs.items()}
    outputs = fn(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    floating = [o for o in outputs if o.is_floating_point()]
    cotangents = [cotangent(o, i) for i, o in enumerate(floating)]
    grads = torch.autograd.grad(floating, [leaves[n] for n in wanted], cotangents)
    return tuple(o.detach() for o in outputs), dict(zip(wanted, grads, strict=True))
