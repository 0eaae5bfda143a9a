"""Gradients of the ops: against finite differences, against autograd through the reference, and their contract."""

from __future__ import annotations

import random

import pytest
import torch
from op_cases import FLOATS, LAYOUTS, assert_as_good, cotangent, double, gradients, lora, rand, router
from torch.autograd import gradcheck

from moerge_ext import ops, reference

NAN = float("nan")
F64 = torch.float64


def names(case):
    return tuple(n for n, t in case.items() if t.is_floating_point())


def route_case(T=12, D=7, E=5, N=None, dtype=torch.float32):
    case = dict(zip(("x", "gates"), router(T, D, E, dtype, dtype), strict=True))
    if N:
        case["bias"] = rand(N, E, seed=3, dtype=dtype)
    return case


def routed_case(T=12, dtype=torch.float32, **sizes):
    case = lora(T, 7, 5, 2, 3, 6, base=dtype, x=dtype, bank=dtype, lora_bias=True, **sizes)
    return {n: t for n, t in case.items() if n not in ("weights", "experts")} | {
        "gates": rand(5, 7, seed=2, dtype=dtype)
    }


def same_gradients(op, case, atol=5e-6, **options):
    """Ours against autograd through the reference, by the 2x rule; every gradient has its input's dtype."""
    fn, plain = getattr(ops, op), getattr(reference, op)
    ours = gradients(fn, case, names(case), **options)[1]
    theirs = gradients(plain, case, names(case), **options)[1]
    truth = gradients(plain, double(case), names(case), **options)[1]
    for name in names(case):
        assert ours[name].dtype == case[name].dtype and ours[name].shape == case[name].shape, name
        assert_as_good(ours[name], theirs[name], truth[name], atol)
    return ours


def check_numerically(fn, case, alone=True, **options):
    """gradcheck for all inputs together and for each alone (each alone takes another path through the kernels)."""
    for wanted in (names(case), *((n,) for n in names(case) if alone)):
        leaves = [case[n].clone().requires_grad_() for n in wanted]

        def call(*values, wanted=wanted):
            out = fn(**{**case, **dict(zip(wanted, values, strict=True))}, **options)
            return tuple(o for o in (out if isinstance(out, tuple) else (out,)) if o.is_floating_point())

        assert gradcheck(call, leaves, fast_mode=True)


ROWS = torch.tensor([2, 0, 1, 1, 2, 0, 0, 1, 2, 2, 0, 0]).int()
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
ROUTES = [
    {}, {"top_k": 1}, {"top_k": 5, "normalize": "unit"}, {"normalize": "none", "weighting": "sigmoid"},
    {"absolute": True, "scale": 0.7, "weighting": "score"}, {"top_k": 3, "weighting": "softmax_all"},
    {"top_k": 4, "top_p": 0.7}, {"top_k": 4, "top_p": 0.7, "weighting": "softmax_all", "normalize": "unit"},
    {"top_k": 4, "top_p": 0.6, "weighting": "sigmoid", "mask": MASK[0]}, {"top_k": 2, "mask": MASK, "rows": ROWS},
    {"top_k": 3, "mask": MASK, "weighting": "softmax_all"}, {"top_k": 3, "mask": MASK, "weighting": "score"},
    {"top_k": 3, "rows": ROWS, "absolute": True, "weighting": "softmax_all"},
]  # fmt: skip


@pytest.mark.parametrize("options", ROUTES, ids=str)
def test_route_gradcheck(options):
    check_numerically(ops.route, route_case(N=3, dtype=F64), **options)


@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_route_like_reference(options, x):
    case = route_case(N=3)
    case["x"] = case["x"].to(x)
    case["bias"] = case["bias"].bfloat16()
    same_gradients("route", case, **options)


@pytest.mark.parametrize("shape", [(1, 8, 2, 1), (33, 37, 7, 7), (129, 600, 36, 9), (300, 64, 166, 3)], ids=str)
@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
def test_route_shapes(shape, normalize):
    T, D, E, K = shape
    for weighting in ("softmax_all", "softmax"):
        same_gradients("route", route_case(T, D, E, N=1), top_k=K, normalize=normalize, weighting=weighting)


def test_route_gradients_survive_a_large_mean():
    case = route_case(9, 64, 5)
    case["x"] = 1000 + 0.5 * case["x"]
    ours = gradients(ops.route, case, ("x", "gates"))[1]
    truth = gradients(reference.route, double(case), ("x", "gates"))[1]
    for name in ("x", "gates"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
def test_route_gradient_of_a_zero_token(normalize):
    """A padded token of zeros scores 0 everywhere: its weights are kept weights, with top_p too."""
    case = route_case(3, 6, 4, N=1)
    case["x"][1], case["bias"] = 0, torch.zeros(1, 4)
    for weighting in ("score", "sigmoid", "softmax"):
        for top_p in (None, 0.6):
            same_gradients("route", case, top_k=3, normalize=normalize, weighting=weighting, top_p=top_p)


LORAS = [{"factored": f, "kind": k} for f in (False, True) for k in ("tokens", "rows", "ids", "repeats", "zeros")]


@pytest.mark.parametrize("options", LORAS, ids=str)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_lora_gradcheck(options, lora_bias):
    kind = options["kind"]
    rest = {"rows": ROWS} if kind == "rows" else {}
    n = {"rows": 3, "ids": 4}.get(kind)
    case = lora(12, 5, 4, 3, 2, 6, N=n, base=F64, x=F64, bank=F64, lora_bias=lora_bias)
    case["weights"] = case["weights"].double()
    if kind == "repeats":
        case["experts"] = torch.tensor([[1, 1, 3], [2, 1, 2], [0, 0, 0], [3, 2, 3]]).int().repeat(3, 1)
    if kind == "zeros":  # the gradient of a weight of 0 is true; factored and duplicates included
        case["weights"][::2, 1] = 0
        case["weights"][3] = 0
    check_numerically(ops.lora_apply, case, factored=options["factored"], **rest)


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("bank", FLOATS)
def test_lora_dtypes(turn, bank):
    base, x = FLOATS[turn], FLOATS[(2 * turn + FLOATS.index(bank)) % 4]
    case = lora(20, 9, 4, 2, 3, 6, base=base, x=x, bank=bank, lora_bias=True)
    case["weights"] = case["weights"].to(bank)
    same_gradients("lora_apply", case)
    same_gradients("lora_apply", case, factored=True)


SHAPES = [(1, 64, 7, 2, 8, 37), (33, 37, 12, 9, 24, 41), (300, 8, 2, 2, 64, 300), (129, 200, 36, 3, 4, 16),
          (600, 7, 3, 1, 1, 5)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factored", [False, True])
def test_lora_shapes(shape, factored):
    """An expert nobody picks among them; its gradient is exactly 0."""
    T, D, E, K, R, O = shape
    case = lora(T, D, E, K, R, O, lora_bias=True)
    if E > 2:
        case["experts"][case["experts"] == 1] = 0
    grads = same_gradients("lora_apply", case, 2e-5, factored=factored)
    assert E <= 2 or all((grads[n][1] == 0).all() for n in ("lora_a", "lora_b", "lora_bias"))


@pytest.mark.parametrize("options", ROUTES, ids=str)
@pytest.mark.parametrize("factored", [False, True])
def test_routed_gradients(options, factored):
    case = routed_case(dtype=F64) | {"bias": rand(3, 5, seed=30, dtype=F64)}
    if not factored:
        check_numerically(ops.routed_lora, case, alone=False, **options)
    same_gradients("routed_lora", case, factored=factored, **options)


@pytest.mark.parametrize("factored", [False, True])
def test_routed_equals_two_ops(factored):
    case = routed_case(40)

    def two(base, x, gates, lora_a, lora_b, lora_bias):
        weights, experts = ops.route(x, gates, top_k=3)
        y = ops.lora_apply(base, x, lora_a, lora_b, weights, experts, lora_bias=lora_bias, factored=factored)
        return y, weights, experts

    one = gradients(ops.routed_lora, case, names(case), top_k=3, factored=factored)[1]
    other = gradients(two, case, names(case))[1]
    for name in names(case):
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("op", ["route", "lora_apply", "routed_lora", "mix_log_probs"])
def test_options_left_at_their_defaults_have_gradients(op):
    """torch drops trailing arguments that have their default from what the backward sees."""
    routed = routed_case()
    del routed["lora_bias"]
    mixture = {"logits": rand(2, 3, 4), "weights": torch.ones(3, 2)}
    case = {"route": route_case(), "lora_apply": lora(), "routed_lora": routed, "mix_log_probs": mixture}[op]
    same_gradients(op, case)


@pytest.mark.parametrize("op", ["lora_apply", "routed_lora"])
def test_no_tokens(op):
    case = lora(0, 7, 5, 2, 3, 6, lora_bias=True) if op == "lora_apply" else routed_case(0)
    for name, grad in gradients(getattr(ops, op), case, names(case))[1].items():
        assert grad.shape == case[name].shape and (grad == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["route", "lora_apply", "routed_lora"])
def test_memory_layout_does_not_matter(layout, op):
    case = {"route": route_case(12, 37, N=3), "lora_apply": lora(37, 29, 6, 3, 5, 35, lora_bias=True)}.get(op)
    case = case or routed_case(37)
    moved = {n: LAYOUTS[layout](t) for n, t in case.items()}
    want, got = (gradients(getattr(ops, op), c, names(case))[1] for c in (case, moved))
    for name in names(case):  # close, not equal: factors and gates stored the other way are summed in another order
        torch.testing.assert_close(want[name], got[name], msg=name)
    # the gradient that arrives may have any layout, too
    y = getattr(ops, op)(**{n: t.requires_grad_(n in names(case)) for n, t in case.items()})
    y = y if isinstance(y, torch.Tensor) else y[0]
    leaves = [case[n] for n in names(case) if n != "base"]
    grad = rand(*y.shape, seed=5)
    for upstream in (LAYOUTS[layout](grad), torch.ones(()).expand_as(y)):
        want = torch.autograd.grad(y, leaves, upstream.contiguous(), retain_graph=True)
        got = torch.autograd.grad(y, leaves, upstream, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("op", ["route", "lora_apply", "routed_lora"])
def test_only_what_is_asked_for(op):
    case = {"route": route_case(N=3), "lora_apply": lora(lora_bias=True), "routed_lora": routed_case()}[op]
    want = gradients(getattr(ops, op), case, names(case))[1]
    for name in names(case):
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in case.items()}
        out = getattr(ops, op)(**leaves)
        out = out if isinstance(out, tuple) else (out,)
        floating = [o for o in out if o.is_floating_point()]
        assert any(o.requires_grad for o in floating) and not any(
            o.requires_grad for o in out if o.dtype == torch.int32
        )
        used = [(i, o) for i, o in enumerate(floating) if o.requires_grad]
        torch.autograd.backward([o for _, o in used], [cotangent(o, i) for i, o in used])
        assert torch.equal(leaves[name].grad, want[name])
        assert all(t.grad is None for n, t in leaves.items() if n != name)
    out = getattr(ops, op)(**case)
    assert not any(o.requires_grad for o in (out if isinstance(out, tuple) else (out,)))


def test_only_one_output_used():
    case = {n: t.requires_grad_() for n, t in routed_case().items()}
    y, weights, _ = ops.routed_lora(**case)
    grads = torch.autograd.grad(weights[:, 0].sum(), list(case.values()), retain_graph=True, allow_unused=True)
    assert [g is not None for g in grads] == [n in ("x", "gates") for n in case]
    grads = torch.autograd.grad(y.sum(), list(case.values()))
    assert all(g.isfinite().all() for g in grads) and torch.equal(grads[0], torch.ones_like(y))


def test_nan_of_an_expert_nobody_reads_reaches_no_gradient():
    """Masked, unselected and zero-weight experts, in ours and in the reference."""
    mask = torch.tensor([True, False, False, False, True])
    clean = routed_case(20)
    dirty = {n: t.clone() for n, t in clean.items()}
    for name in ("lora_a", "lora_b", "lora_bias"):
        dirty[name][1:4] = NAN
    for factored in (False, True):
        options = {"mask": mask, "top_k": 4, "factored": factored}
        want = gradients(ops.routed_lora, clean, names(clean), **options)[1]
        for module in (ops, reference):
            got = gradients(module.routed_lora, dirty, names(clean), **options)[1]
            for name in names(clean):
                torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)
    # gates of masked experts
    dirty["gates"][1:4] = NAN
    got = gradients(ops.routed_lora, dirty, names(clean), **options)[1]
    assert all(torch.equal(got[n], want[n]) for n in names(clean))


def test_nan_behind_a_weight_that_underflowed():
    """A kept expert whose softmax weight is exactly 0 is not read forward; its NaN stays out of the gradients too."""
    case = routed_case(20)
    case["bias"] = torch.tensor([[0.0, 0.0, 0.0, 0.0, -1000.0]])
    case["lora_a"][4] = NAN
    for weighting in ("softmax", "softmax_all", "sigmoid"):
        outputs, grads = gradients(ops.routed_lora, case, names(case), top_k=5, weighting=weighting)
        assert outputs[0].isfinite().all()
        assert all(g.isfinite().all() for g in grads.values()), weighting


def test_nan_token_spoils_only_its_own_input_gradient():
    case = lora(40, 16, 6, 2, 4, 18)
    clean = gradients(ops.lora_apply, case, ("x",))[1]["x"]
    case["x"][7] = NAN
    got = gradients(ops.lora_apply, case, ("x",))[1]["x"]
    assert torch.equal(got, clean)  # dx does not depend on x
    route = route_case(20)
    clean = gradients(ops.route, route, ("x",))[1]["x"]
    route["x"][7] = NAN
    got = gradients(ops.route, route, ("x",))[1]["x"]
    others = torch.arange(20) != 7
    assert got[7].isnan().all() and torch.equal(got[others], clean[others])


@pytest.mark.parametrize("op", ["route", "lora_apply", "routed_lora", "mix_log_probs"])
def test_double_backward_is_refused(op):
    case = {
        "route": route_case(), "lora_apply": lora(), "routed_lora": routed_case(),
        "mix_log_probs": {"logits": rand(2, 3, 4), "weights": torch.ones(3, 2)},
    }[op]  # fmt: skip
    leaves = {n: t.detach().requires_grad_(t.is_floating_point()) for n, t in case.items()}
    out = getattr(ops, op)(**leaves)
    out = out[0] if isinstance(out, tuple) else out
    first = torch.autograd.grad(out.square().sum(), [leaves[n] for n in names(case)], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives .* not supported"):
        sum(g.sum() for g in first).backward()


def test_forward_mode_is_refused():
    x, gates = router()
    with pytest.raises(ValueError, match="moerge::route: forward-mode differentiation .* not supported"):
        torch.func.jvp(lambda x: ops.route(x, gates)[0], (x,), (torch.ones_like(x),))
    torch.func.jvp(lambda y: y * ops.route(x, gates)[0].sum(), (x,), (x,))  # what carries no tangent may be used


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    from torch.utils.checkpoint import checkpoint

    case = routed_case()
    want = gradients(ops.routed_lora, case, names(case))[1]
    order = list(case)

    def again(**leaves):
        call = lambda *values: ops.routed_lora(**dict(zip(order, values, strict=True)))  # noqa: E731
        return checkpoint(call, *(leaves[n] for n in order), use_reentrant=reentrant)

    leaves = {n: t.detach().requires_grad_() for n, t in case.items()}
    outputs = [o for o in again(**leaves) if o.is_floating_point()]
    torch.autograd.backward(outputs, [cotangent(o, i) for i, o in enumerate(outputs)])
    assert all(torch.equal(leaves[n].grad, want[n]) for n in order)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_random_cases(seed):
    """Any shape, dtype and option together: outputs and every gradient of routed_lora like the reference."""
    pick = random.Random(seed).choice
    T, D, E = pick([1, 2, 33, 129, 1000]), pick([1, 8, 63, 200]), pick([1, 2, 7, 36])
    R, O, N = pick([1, 8, 16, 24, 64]), pick([1, 8, 37, 300]), pick([1, T])
    case = lora(T, D, E, 1, R, O, base=pick(FLOATS), x=pick(FLOATS), bank=pick(FLOATS), lora_bias=pick([True, False]))
    del case["weights"], case["experts"]
    case |= {"gates": rand(E, D, seed=seed, dtype=pick(FLOATS)), "bias": rand(N, E, seed=seed + 1, dtype=pick(FLOATS))}
    options = {
        "top_k": pick(sorted({1, (E + 1) // 2, E})),
        "normalize": pick(["standardize", "unit", "none"]),
        "scale": pick([None, 0.05]) if D <= 8 else None,
        "absolute": pick([True, False]),
        "mask": pick([None, rand(E, seed=2) > -1, rand(N, E, seed=3) > 0]),
        "weighting": pick(["softmax", "softmax_all", "sigmoid"]),
        "factored": pick([True, False]),
    }
    case["gates"] = case["gates"] / D**0.5
    outputs, ours = gradients(ops.routed_lora, case, names(case), **options)
    plain, theirs = gradients(reference.routed_lora, case, names(case), **options)
    exact, truth = gradients(reference.routed_lora, double(case), names(case), **options)
    if not torch.equal(outputs[2], exact[2]):
        pytest.skip("a tie within rounding")
    for got, near, true in zip(outputs[:2], plain[:2], exact[:2], strict=True):
        assert_as_good(got, near, true, 1e-5)
    for name in names(case):
        assert_as_good(ours[name], theirs[name], truth[name], 5e-5)


def test_backward_ops_check_the_ids_they_are_given():
    x, gates = torch.randn(3, 4), torch.randn(5, 4)
    weights, experts = ops.route(x, gates)
    with pytest.raises(RuntimeError, match="experts must hold ids in"):
        torch.ops.moerge.route_backward(torch.ones_like(weights), weights, experts + 100, x, gates, 7)
