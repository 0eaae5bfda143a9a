"""routed_linear: the base layer and its routed experts in one op."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import LAYOUTS, assert_as_good, double, gradients, lora, rand, same_experts

from moerge_ext import ops, reference
from moerge_ext.ops.options import BRANCH, filled

NAN = float("nan")
HALVES = (torch.bfloat16, torch.float16)
MASK = torch.tensor([True, False] + [True] * 5)
OPTIONS = [
    {},
    {"top_k": 7, "weighting": "softmax_all"},
    {"top_k": 3, "top_p": 0.6, "normalize": "none", "absolute": True, "scale": 0.3},
    {"top_k": 5, "mask": MASK, "weighting": "sigmoid", "normalize": "unit", "factored": True},
    {"top_k": 2, "mask": ~MASK, "weighting": "score"},
]
INPUTS = ("x", "weight", "linear_bias", "gates", "lora_a", "lora_b")


def linear(T=5, D=24, E=7, R=4, O=20, dtype=torch.float32, N=None, biases=True):
    """Inputs of routed_linear by name; the bank's axes are stored as a bank stores them."""
    case = lora(T, D, E, 2, R, O, x=dtype, bank=dtype, lora_bias=biases)
    case = {n: case[n] for n in ("x", "lora_a", "lora_b", "lora_bias") if n in case}
    case["lora_a"] = case["lora_a"].mT.contiguous().mT
    case["weight"] = (rand(O, D, seed=11) / max(D, 1) ** 0.5).to(dtype)
    case["linear_bias"] = rand(O, seed=12, dtype=dtype) if biases else None
    case["gates"] = rand(E, D, seed=3)
    if N is not None:
        case["bias"] = rand(N, E, seed=4)
    return case


def doubled(case):
    given = double({n: t for n, t in case.items() if t is not None})
    return {n: given.get(n) for n in case}


def check(case, atol=1e-6, **options):
    y, weights, experts = ops.routed_linear(**case, **options)
    branch = filled(BRANCH, options | {n: case.get(n) for n in ("bias", "lora_bias") if n in case})
    alone = ops.ROUTED_LINEAR_Y(*(case[n] for n in INPUTS), *branch.values())
    assert torch.equal(alone, y) and alone.dtype == y.dtype
    plain = reference.routed_linear(**case, **options)
    truth = reference.routed_linear(**doubled(case), **options)
    chosen = {n: t for n, t in options.items() if n not in ("factored", "packed")}
    scores, ids = reference.route(
        case["x"].double().flatten(0, -2), case["gates"].double(),
        **{**chosen, "top_k": case["gates"].shape[0], "weighting": "score", "top_p": None, "bias": case.get("bias")},
    )  # fmt: skip
    same_experts(experts, truth[2], torch.zeros_like(scores).scatter(-1, ids.long(), scores))
    assert_as_good(weights, plain[1], truth[1], 1e-5)
    assert_as_good(y, plain[0], truth[0], atol)
    return y, weights, experts


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64])
@pytest.mark.parametrize("T", [1, 2, 9, 33])
def test_against_the_reference(T, dtype):
    atol = {torch.float32: 2e-6, torch.float64: 1e-12}.get(dtype, 4e-3)
    for options in OPTIONS:
        check(linear(T, dtype=dtype), atol, **options)
    check(linear(T, dtype=dtype, biases=False), atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", [True, False])
def test_very_many_tokens(dtype, biases):
    """On a GPU the branch comes first there, and the base layer's product is added to it."""
    case = linear(1100, 40, 7, 16, 24, dtype, biases=biases)
    atol = 2e-6 if dtype == torch.float32 else 8e-3  # y is rounded twice
    y, _, experts = check(case, atol)
    check(case, atol, factored=True, top_k=3, mask=MASK)
    y2 = ops.routed_linear(**{**case, "weight": LAYOUTS["transposed"](case["weight"])})[0]
    torch.testing.assert_close(y2, y, atol=atol, rtol=1e-2)
    got = ops.routed_linear(**case, mask=torch.zeros(7, dtype=torch.bool))[0]
    base = torch.nn.functional.linear(case["x"], case["weight"], case["linear_bias"])
    torch.testing.assert_close(got, base, atol=atol, rtol=1e-2)
    expert, lora_b = int(experts[0, 0]), case["lora_b"].clone()
    lora_b[expert] = NAN
    got, uses = ops.routed_linear(**{**case, "lora_b": lora_b})[0], (experts == expert).any(-1)
    assert torch.equal(got[~uses], y[~uses]) and got[uses].isnan().all()


@pytest.mark.parametrize("T", [33, 129])
def test_beside_the_base_layer_the_branch_is_the_same(T, monkeypatch):
    """What a recorded graph of a GPU does; the emulator is told to do it, and nothing else looks at this."""
    case = linear(T, 64, 7, 16, 48, torch.bfloat16)
    want = ops.routed_linear(**case)
    monkeypatch.setenv("MOERGE_SIMT_RECORDING", "1")
    assert all(torch.equal(a, b) for a, b in zip(ops.routed_linear(**case), want, strict=True))


SHAPES = [  # T, D, E, R, O: decode sizes, with tails in every dimension
    (1, 64, 7, 16, 64), (2, 200, 36, 8, 72), (3, 264, 40, 24, 40), (4, 8, 2, 8, 8), (5, 72, 9, 64, 24),
    (8, 320, 7, 16, 136), (8, 64, 3, 128, 16), (1, 1032, 5, 16, 24), (16, 96, 11, 16, 72), (13, 40, 4, 8, 24),
    (2, 4168, 5, 8, 40), (11, 2120, 4, 40, 24), (3, 64, 500, 8, 40), (2, 8, 1030, 8, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_few_tokens(shape, dtype):
    T, D, E, R, O = shape
    check(linear(T, D, E, R, O, dtype), 4e-3, top_k=min(3, E))
    check(linear(T, D, E, R, O, dtype, N=T, biases=False), 4e-3, factored=True)


@pytest.mark.parametrize("D", [8, 24, 4168])
@pytest.mark.parametrize("T", [3, 11])
def test_few_tokens_of_any_scale(T, D):
    """Their statistics are found in parts, around a pivot or divided by the largest value."""
    case = linear(T, D, 6, 8, 16, torch.bfloat16, biases=False)
    case["x"] *= torch.tensor([1, 1e30, 1e-30])[torch.arange(T) % 3, None]
    case["x"][-1] = 0
    kinds = ("standardize", "unit")
    x, gates = case["x"].double(), case["gates"].double()
    wanted = {kind: reference.route(x, gates, top_k=3, normalize=kind) for kind in kinds}
    for kind in kinds:
        _, weights, experts = ops.routed_linear(**case, top_k=3, normalize=kind)
        fine = ((case["x"].float().abs() < 1e20) | (kind == "unit")).all(-1)  # else a variance is infinite
        torch.testing.assert_close(weights[fine], wanted[kind][0][fine].float(), atol=2e-5, rtol=1e-4)
        assert torch.equal(experts[fine], wanted[kind][1][fine])
    case["x"] = rand(T, D, seed=20).to(torch.bfloat16) + 50  # far from 0
    weights, experts = ops.routed_linear(**case, top_k=3)[1:]
    types = (torch.float32, torch.float64)
    plain, truth = (reference.route(case["x"].to(t), case["gates"].to(t), top_k=3) for t in types)
    assert torch.equal(experts, truth[1])
    assert_as_good(weights, plain[0], truth[0], 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"factored": True, "top_k": 3, "top_p": 0.7}], ids=str)
def test_the_branch_alone(shape, options):
    """routed_lora of as few tokens and of a bank as it lies in memory; written into base it has the same bits."""
    T, D, E, R, O = shape
    dtype = HALVES[T % 2]
    case = linear(T, D, E, R, O, dtype, N=1)
    del case["weight"], case["linear_bias"]
    options = {**options, "top_k": min(E, options.get("top_k", 2))}
    base = rand(T, O + 8, seed=13, dtype=dtype)[:, :O]
    y, weights, experts = ops.routed_lora(base, **case, **options)
    plain = reference.routed_lora(base, **case, **options)
    truth = reference.routed_lora(base.double(), **double(case), **options)
    assert torch.equal(experts, truth[2])
    assert_as_good(weights, plain[1], truth[1], 1e-5)
    assert_as_good(y, plain[0], truth[0], 4e-3)
    again, written = ops.routed_lora(base, **case, **options), base.clone()
    assert all(torch.equal(a, b) for a, b in zip(again, (y, weights, experts), strict=True))
    ops.routed_lora_(written, **case, **options)
    assert torch.equal(written, y)
    whole = torch.full((T, O + 8), NAN, dtype=dtype)
    whole[:, :O] = base
    ops.routed_lora_(whole[:, :O], **case, **options)
    assert torch.equal(whole[:, :O], y) and whole[:, O:].isnan().all()


def test_more_dimensions_and_rows():
    case = linear(12, N=3)
    want = check(case)
    for shape in ((12,), (3, 4), (2, 3, 2)):
        got = ops.routed_linear(**{**case, "x": case["x"].unflatten(0, shape)})
        assert got[0].shape == (*shape, 20) and torch.equal(got[0].flatten(0, -2), want[0])
        assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))
    rows = torch.arange(3).repeat_interleave(4).int()
    assert torch.equal(check(case, rows=rows)[0], want[0])


def test_packed_gives_the_same_bits():
    for dtype, T in itertools.product((torch.float32, torch.bfloat16), (1, 9)):
        case = linear(T, 64, 7, 8, 64, dtype)
        want = ops.routed_linear(**case)
        packed = ops.pack_experts(case["lora_a"], case["lora_b"])
        got = ops.routed_linear(**case, packed=packed)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, dtype):
    case = linear(3, 64, 7, 8, 48, dtype)
    want = ops.routed_linear(**case)[0]
    for name, tensor in case.items():
        got = ops.routed_linear(**{**case, name: LAYOUTS[layout](tensor)})[0]
        torch.testing.assert_close(got, want, atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype):
    y, weights, experts = ops.routed_linear(**linear(0, dtype=dtype))
    assert y.shape == (0, 20) and weights.shape == experts.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_where_it_belongs(dtype):
    """A NaN token, and an expert of NaN that only some tokens use."""
    case = linear(4, 64, 7, 8, 48, dtype)
    y, _, experts = ops.routed_linear(**case)
    bad = {**case, "x": case["x"].clone()}
    bad["x"][2, 5] = NAN
    got = ops.routed_linear(**bad)[0]
    others = torch.arange(4) != 2
    assert torch.equal(got[others], y[others]) and got[2].isnan().all()
    expert = int(experts[0, 0])
    bad = {**case, "lora_b": case["lora_b"].clone(), "lora_a": case["lora_a"].clone()}
    bad["lora_a"][expert], bad["lora_b"][expert] = NAN, NAN
    got, uses = ops.routed_linear(**bad)[0], (experts == expert).any(-1)
    assert torch.equal(got[~uses], y[~uses]) and got[uses].isnan().all()


def test_everything_masked_is_the_base_layer():
    for dtype in (torch.float32, torch.bfloat16):
        case = linear(3, 64, 7, 8, 48, dtype)
        y, weights, experts = ops.routed_linear(**case, mask=torch.zeros(7, dtype=torch.bool))
        base = torch.nn.functional.linear(case["x"], case["weight"], case["linear_bias"])
        torch.testing.assert_close(y, base)
        assert (weights == 0).all() and experts.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients(dtype, shape):
    case = linear(torch.Size(shape).numel(), 16, 7, 8, 24, dtype, N=1)
    case["x"] = case["x"].unflatten(0, shape)
    for options in ({}, {"factored": True, "weighting": "sigmoid"}):
        ours = gradients(ops.routed_linear, case, tuple(case), **options)[1]
        plain = gradients(reference.routed_linear, case, tuple(case), **options)[1]
        truth = gradients(reference.routed_linear, double(case), tuple(case), **options)[1]
        for name in case:
            assert_as_good(ours[name], plain[name], truth[name], 1e-12 if dtype == torch.float64 else 1e-2)


def test_only_the_gradients_that_are_wanted():
    case = linear(5, N=1)
    want = gradients(ops.routed_linear, case, tuple(case))[1]
    for name in case:
        assert torch.equal(gradients(ops.routed_linear, case, (name,))[1][name], want[name])


def test_one_vector_is_one_token():
    """Computed, differentiated, and as a fake kernel tells its shapes."""
    case = linear(1)
    outputs, grads = gradients(ops.routed_linear, case, tuple(case))
    alone = {**case, "x": case["x"][0]}
    got, alone_grads = gradients(ops.routed_linear, alone, tuple(alone))
    assert got[0].shape == (20,) and torch.equal(got[0], outputs[0][0]) and torch.equal(got[1], outputs[1])
    assert torch.equal(alone_grads["x"], grads["x"][0]) and torch.equal(alone_grads["weight"], grads["weight"])
    fake = ops.routed_linear(**{n: t.to("meta") for n, t in alone.items()})
    assert [t.shape for t in fake] == [t.shape for t in got]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": rand(20, 23)}, r"weight must be \[O, D=24\] to match x, got \[20, 23\]"),
        ({"weight": rand(20, 24, dtype=torch.bfloat16)}, "weight must be float32 like x, got bfloat16"),
        ({"linear_bias": rand(19)}, r"linear_bias must be \[O=20\] to match weight, got \[19\]"),
        ({"linear_bias": rand(20).double()}, "linear_bias must be float32 like x, got float64"),
        (
            {"x": rand(2, 24, 3).mT},
            r"x must be \[T, D\], or with another .* equal distances, got \[2, 3, 24\] with strides",
        ),
        ({"lora_b": rand(7, 21, 4)}, r"lora_b must be \[E=7, O=20, R=4\]"),
        ({"gates": rand(6, 24)}, r"lora_a must be \[E=6, R, D\] to match gates"),
        ({"top_k": 8}, r"top_k must be in \[1, E=7\], got 8"),
    ],
    ids=str,
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"^moerge::routed_linear: {message}"):
        ops.routed_linear(**{**linear(), **change})


def test_packed_is_for_inference():
    case = linear()
    case["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"^moerge::routed_linear: packed is for inference"):
        ops.routed_linear(**case, packed=ops.pack_experts(case["lora_a"], case["lora_b"]))


def test_autocast_casts_nothing():
    case = linear(N=1)
    want = ops.routed_linear(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.routed_linear(**case)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad):
    case = linear(6, N=3)
    inputs = [case[n].requires_grad_(grad) for n in INPUTS]
    op = torch.ops.moerge.routed_linear.default
    torch.library.opcheck(op, (*inputs, 2, "standardize", False, None, case["bias"].requires_grad_(grad)))
    torch.library.opcheck(op, (inputs[0].detach().view(2, 3, 24), inputs[1].detach(), None, *inputs[3:]))
    torch.library.opcheck(ops.ROUTED_LINEAR_Y, tuple(t.detach() for t in inputs))


def test_compiles_without_a_break():
    torch._dynamo.reset()
    compiled = torch.compile(ops.routed_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 8, 33):
        case = linear(T)
        want, want_grads = gradients(ops.routed_linear, case, tuple(case))
        got, grads = gradients(compiled, case, tuple(case))
        for a, b in zip((*got, *grads.values()), (*want, *want_grads.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
