"""moerge::lora_apply, lora_apply_, routed_lora and pack_experts against the reference and against their contract."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import FLOATS, LAYOUTS, check_lora, lora, rand, same_experts

from moerge_ext import ops, reference

NAN, INF = float("nan"), float("inf")


SHAPES = [  # T, D, E, K, R, O
    (0, 8, 2, 1, 4, 8), (1, 1, 1, 1, 1, 1), (1, 64, 7, 2, 8, 37), (2, 8, 7, 7, 16, 64), (33, 37, 36, 9, 24, 41),
    (129, 200, 7, 2, 64, 63), (33, 64, 166, 166, 1, 8), (2, 8, 12, 3, 16, 4096), (1000, 33, 36, 4, 8, 17),
    (300, 8, 2, 2, 4, 600), (1, 4096, 2, 1, 16, 200), (5, 0, 3, 2, 4, 6), (5, 6, 3, 2, 0, 7), (5, 6, 3, 0, 2, 7),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_shapes(shape, factored, lora_bias):
    T, D, E, K, R, O = shape
    check_lora(lora(T, D, E, K, R, O, lora_bias=lora_bias), factored=factored)


@pytest.mark.parametrize("base", FLOATS)
@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("bank", FLOATS)
def test_dtypes(base, x, bank):
    case = lora(21, 35, 5, 3, 6, 23, base=base, x=x, bank=bank, lora_bias=True)
    assert check_lora(case).dtype == base
    assert check_lora(case, factored=True).dtype == base


def test_mixed_bank_dtypes():
    case = lora(9, 12, 4, 2, 3, 10, lora_bias=True)
    for name, dtype in (("lora_a", torch.float16), ("lora_b", torch.bfloat16), ("lora_bias", torch.float64)):
        case[name] = case[name].to(dtype)
    case["weights"] = case["weights"].bfloat16()
    check_lora(case)


@pytest.mark.parametrize("factored", [False, True])
def test_weights_per_row(factored):
    case = lora(24, 16, 6, 3, 4, 18, N=4, lora_bias=True)
    y = check_lora(case, factored=factored)
    rows = torch.arange(4).repeat_interleave(6).int()
    assert torch.equal(ops.lora_apply(**case, rows=rows, factored=factored), y)
    every = {**case, "weights": case["weights"][rows.long()], "experts": case["experts"][rows.long()]}
    assert torch.equal(ops.lora_apply(**every, factored=factored), y)
    check_lora(case, rows=rows.flip(0) * 0 + rows[torch.randperm(24)], factored=factored)


@pytest.mark.parametrize("factored", [False, True])
def test_one_expert_named_often(factored):
    case = lora(300, 16, 6, 5, 4, 18, lora_bias=True)
    for ids in (torch.full((300, 5), 3), torch.tensor([1, 1, 4, 1, 4]).expand(300, 5)):
        check_lora({**case, "experts": ids.int().contiguous()}, factored=factored)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("factored", [False, True])
def test_what_is_not_selected_is_not_read(bad, factored):
    case = lora(40, 16, 6, 3, 4, 18, lora_bias=True)
    experts, weights = case["experts"], case["weights"]
    weights[experts == 2] = 0.0  # selected with weight 0
    experts[experts == 5] = 2  # nobody picks it
    weights[experts == 2] = 0.0
    clean = ops.lora_apply(**case, factored=factored)
    for name in ("lora_a", "lora_b", "lora_bias"):
        case[name] = case[name].clone()
        case[name][[2, 5]] = bad
    assert torch.equal(ops.lora_apply(**case, factored=factored), clean) and clean.isfinite().all()
    packed = ops.pack_experts(case["lora_a"], case["lora_b"])
    torch.testing.assert_close(ops.lora_apply(**case, factored=factored, packed=packed), clean)
    zero = ops.lora_apply(**{**case, "weights": torch.zeros(40, 3)}, factored=factored)
    assert torch.equal(zero, case["base"])


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("place", ["x", "base", "weights"])
def test_a_bad_token_is_alone(place, factored):
    case = lora(300, 16, 6, 3, 4, 18)
    clean = ops.lora_apply(**case, factored=factored)
    case[place] = case[place].clone()
    case[place][70, 1] = NAN
    y = ops.lora_apply(**case, factored=factored)
    others = torch.arange(300) != 70
    assert torch.equal(y[others], clean[others]) and y[70, 1].isnan()
    assert y[70].isnan().all() or place == "base"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factored", [False, True])
def test_memory_layout_does_not_matter(layout, dtype, factored):
    """Odd sizes, so that vector tails run. Every layout of every argument gives the same bits, but lora_a's: stored as
    [E,D,R] (as in a bank, and packed) it is summed in another order than as [E,R,D]."""
    case = lora(37, 29, 6, 3, 5, 35, base=dtype, x=dtype, bank=dtype, lora_bias=True)
    case["lora_a"] = case["lora_a"].mT.contiguous().mT
    want = ops.lora_apply(**case, factored=factored)
    move = LAYOUTS[layout]
    for name in case:
        y = ops.lora_apply(**{**case, name: move(case[name])}, factored=factored)
        if name == "lora_a":
            torch.testing.assert_close(y, want)
        else:
            assert torch.equal(y, want), name
    moved = {name: move(value) for name, value in case.items()}
    torch.testing.assert_close(ops.lora_apply(**moved, factored=factored), want)
    packed = ops.pack_experts(moved["lora_a"], moved["lora_b"])
    assert torch.equal(packed, reference.pack_experts(case["lora_a"], case["lora_b"])) and packed.is_contiguous()
    assert torch.equal(ops.lora_apply(**case, factored=factored, packed=packed), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_place_is_the_same(layout, dtype):
    case = lora(37, 29, 6, 3, 5, 35, base=dtype, bank=torch.bfloat16, lora_bias=True)
    want = ops.lora_apply(**case)
    base = LAYOUTS[layout](case["base"].clone())
    assert ops.lora_apply_(**{**case, "base": base}) is None
    assert torch.equal(base, want)
    packed = ops.pack_experts(case["lora_a"], case["lora_b"])
    want = ops.lora_apply(**case, packed=packed)
    ops.lora_apply_(**case, packed=packed)
    assert torch.equal(case["base"], want)


def test_in_place_on_its_own_input():
    case = lora(300, 24, 6, 3, 4, 24)
    want = ops.lora_apply(**{**case, "base": case["x"]})
    y = case["x"].clone()
    ops.lora_apply_(**{**case, "base": y, "x": y})
    assert torch.equal(y, want)


def test_in_place_only_without_grad():
    case = lora()
    version = case["base"]._version
    case["lora_a"].requires_grad_()
    with pytest.raises(ValueError, match=r"^moerge::lora_apply_: it writes in place.*torch.no_grad"):
        ops.lora_apply_(**case)
    assert case["base"]._version == version
    with torch.no_grad():
        ops.lora_apply_(**case)
    with torch.inference_mode():
        ops.lora_apply_(**case)
        ops.lora_apply_(**{**case, "base": case["base"].clone()})


def test_in_place_write_is_seen_by_autograd():
    """A tensor saved for backward and then overwritten must raise, as with torch's own in-place ops."""
    case = lora()
    weight = torch.ones_like(case["base"]).requires_grad_()
    product = weight * case["base"]
    with torch.no_grad():
        ops.lora_apply_(**case)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_in_place_refuses_memory_that_overlaps_itself():
    case = lora(4, 8, 3, 1, 2, 6)
    with pytest.raises(ValueError, match="moerge::lora_apply_: base must not overlap itself"):
        ops.lora_apply_(**{**case, "base": torch.zeros(1, 6).expand(4, 6)})


def test_inputs_are_left_alone():
    case = lora(20, 16, 5, 2, 4, 18, lora_bias=True)
    before = {n: t.clone() for n, t in case.items()}
    ops.lora_apply(**case)
    ops.lora_apply(**case, factored=True, packed=ops.pack_experts(case["lora_a"], case["lora_b"]))
    assert all(torch.equal(case[n], before[n]) for n in case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("factored", [False, True])
def test_a_token_does_not_see_its_batch(dtype, factored):
    case = lora(270, 37, 6, 3, 5, 41, base=dtype, x=dtype, bank=dtype, lora_bias=True)
    y = ops.lora_apply(**case, factored=factored)
    for t in (0, 31, 255, 256, 269):
        alone = {n: v[t : t + 1] if n in ("base", "x", "weights", "experts") else v for n, v in case.items()}
        assert torch.equal(ops.lora_apply(**alone, factored=factored)[0], y[t])


def test_ranks_padded_with_zeros_change_nothing():
    case = lora(33, 40, 6, 3, 5, 41)
    padded = {
        **case,
        "lora_a": torch.nn.functional.pad(case["lora_a"], (0, 0, 0, 11)),
        "lora_b": torch.nn.functional.pad(case["lora_b"], (0, 11)),
    }
    assert torch.equal(ops.lora_apply(**padded), ops.lora_apply(**case))


OPTIONS = [
    {}, {"top_k": 7, "normalize": "unit", "scale": 3.0}, {"top_k": 1, "weighting": "sigmoid"},
    {"top_k": 5, "top_p": 0.7, "weighting": "softmax_all"}, {"absolute": True, "normalize": "none", "scale": 0.3},
    {"per_row": True, "top_k": 3}, {"per_row": True, "shuffled": True, "weighting": "score"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_routed_lora_is_route_then_apply(options, factored, dtype):
    T, N = 36, 3
    case = lora(T, 24, 7, 2, 4, 18, base=dtype, x=dtype, bank=dtype, lora_bias=True)
    case = {n: t for n, t in case.items() if n not in ("weights", "experts")}
    case["gates"] = rand(7, 24, seed=20)
    options = dict(options)
    if options.pop("per_row", False):
        options["bias"], options["mask"] = rand(N, 7, seed=21), rand(N, 7, seed=22) > 0
    if options.pop("shuffled", False):
        options["rows"] = torch.randint(0, N, (T,), generator=torch.Generator().manual_seed(1)).int()
    y, weights, experts = ops.routed_lora(**case, **options, factored=factored)
    w, e = ops.route(case["x"], case["gates"], **options)
    rest = {n: case[n] for n in ("base", "x", "lora_a", "lora_b", "lora_bias")}
    assert torch.equal(experts, e) and torch.equal(weights, w)
    assert torch.equal(y, ops.lora_apply(**rest, weights=w, experts=e, factored=factored))
    base = case["base"].clone()
    assert ops.routed_lora_(**{**case, "base": base}, **options, factored=factored) is None
    assert torch.equal(base, y)
    packed = ops.pack_experts(case["lora_a"], case["lora_b"])
    # a packed bank is summed in another order
    close = {"rtol": 1e-5, "atol": 1e-5} if y.dtype == torch.float32 else {}
    torch.testing.assert_close(ops.routed_lora(**case, **options, factored=factored, packed=packed)[0], y, **close)
    _, ids = reference.route(case["x"], case["gates"], **options)
    same_experts(experts, ids, torch.zeros(T, 7), margin=0.0)


def test_routed_lora_in_place_takes_more_dimensions():
    case = lora(24, 16, 4, 2, 3, 6)
    bank = [rand(4, 16, seed=5), case["lora_a"], case["lora_b"]]
    want = ops.routed_lora(case["base"], case["x"], *bank)[0]
    base, x = case["base"].clone().view(2, 3, 4, 6), case["x"].view(2, 12, 16)
    assert ops.routed_lora_(base, x, *bank) is None
    assert torch.equal(base.flatten(0, -2), want)
    with pytest.raises(
        ValueError,
        match=r"base must be \[T, O\], or with another number of dimensions have its rows at equal distances, got "
        r"\[2, 3, 6, 4\] with strides \[72, 24, 1, 6\]",
    ):
        ops.routed_lora_(base.mT, x, *bank)
    one = case["base"][5].clone()
    assert ops.routed_lora_(one, case["x"][5], *bank) is None
    torch.testing.assert_close(one, want[5])
    # a part of a larger tensor: it begins at an offset
    part = torch.cat([base, case["base"].view(2, 3, 4, 6)])[2:]
    ops.routed_lora_(part, torch.cat([x, x])[2:], *bank)
    assert torch.equal(part.flatten(0, -2), want)
    with pytest.raises(ValueError, match="base must have T=1 rows"):
        ops.routed_lora_(base, x[0, 0], *bank)
    with pytest.raises(ValueError, match="base must have T=12 rows"):
        ops.routed_lora_(base, x[0], *bank)
    with pytest.raises(ValueError, match="it writes in place"):
        ops.routed_lora_(base, x.clone().requires_grad_(), *bank)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(24,), (1, 24), (24, 1), (2, 3, 4), (1,)])
def test_columns_of_a_wider_tensor_are_written_where_they_are(shape, dtype):
    T = math.prod(shape)
    case = lora(T, 16, 4, 2, 3, 6, base=dtype, x=dtype)
    bank = [rand(4, 16, seed=5), case["lora_a"], case["lora_b"]]
    want = ops.routed_lora(case["base"], case["x"], *bank)[0]
    packed = torch.full((*shape, 20), 7.0, dtype=dtype)
    wide = torch.zeros(*shape, 40, dtype=dtype)
    base, x = packed[..., 9:15], wide[..., 3:19]
    base.copy_(case["base"].view(base.shape)), x.copy_(case["x"].view(x.shape))
    assert ops.routed_lora_(base, x, *bank) is None
    assert torch.equal(base.reshape(T, 6), want)
    assert (packed[..., :9] == 7).all() and (packed[..., 15:] == 7).all()
    base.copy_(case["base"].view(base.shape))
    rows, tokens = packed.view(T, 20)[:, 9:15], wide.view(T, 40)[:, 3:19]
    ops.lora_apply_(rows, tokens, *bank[1:], case["weights"], case["experts"])
    assert torch.equal(rows, ops.lora_apply(**case))
    assert (packed[..., :9] == 7).all() and (packed[..., 15:] == 7).all()


def test_rows_at_unequal_distances_are_refused():
    case = lora(6, 16, 4, 2, 3, 6)
    bank = [rand(4, 16, seed=5), case["lora_a"], case["lora_b"]]
    base = torch.zeros(2, 4, 6)[:, :3]
    with pytest.raises(ValueError, match=r"base .* rows at equal distances, got \[2, 3, 6\] with strides \[24, 6, 1\]"):
        ops.routed_lora_(base, case["x"].view(2, 3, 16), *bank)
    with pytest.raises(ValueError, match="x must be .* rows at equal distances"):
        ops.routed_lora_(torch.zeros(2, 3, 6), torch.zeros(2, 4, 16)[:, :3], *bank)
    with pytest.raises(ValueError, match="must not overlap itself"):
        ops.routed_lora_(torch.zeros(6).expand(2, 3, 6), case["x"].view(2, 3, 16), *bank)


def test_routed_lora_with_everything_masked_is_the_base():
    case = lora(9, 8, 4, 2, 3, 6, lora_bias=True)
    args = [case["base"], case["x"], rand(4, 8), case["lora_a"] * NAN, case["lora_b"] * NAN]
    y, weights, experts = ops.routed_lora(
        *args, mask=torch.zeros(4, dtype=torch.bool), lora_bias=case["lora_bias"] * NAN
    )
    assert torch.equal(y, case["base"]) and (weights == 0).all()
    assert torch.equal(experts, torch.arange(2).int().expand(9, 2))


def test_routed_lora_keeps_a_nan_token_alone():
    case = lora(40, 16, 6, 2, 4, 18)
    rest = [rand(6, 16, seed=3), case["lora_a"], case["lora_b"]]
    clean = ops.routed_lora(case["base"], case["x"], *rest)[0]
    case["x"][11, 0] = NAN
    y = ops.routed_lora(case["base"], case["x"], *rest)[0]
    others = torch.arange(40) != 11
    assert torch.equal(y[others], clean[others]) and y[11].isnan().all()


CASE = lora(6, 8, 5, 2, 3, 7, lora_bias=True)
ids = CASE["experts"]
ERRORS = {
    "base 1d": ({"base": CASE["base"][0]}, r"base must be \[T, O\], got \[7\]"),
    "base rows": ({"base": CASE["base"][:5]}, r"base must have T=6 rows to match x, got \[5, 7\]"),
    "base dtype": ({"base": CASE["base"].long()}, r"base must be float16.*, got int64"),
    "x 3d": ({"x": CASE["x"][None]}, r"(x must be \[T, D\]|base must have T).*, got \["),
    "x dtype": ({"x": CASE["x"].int()}, r"x must be float16.*, got int32"),
    "lora_a 2d": ({"lora_a": CASE["lora_a"][0]}, r"lora_a must be \[E, R, D\], got \[3, 8\]"),
    "lora_a D": ({"lora_a": CASE["lora_a"][..., :7]}, r"lora_a must be \[E, R, D=8\] to match x, got \[5, 3, 7\]"),
    "lora_b 2d": ({"lora_b": CASE["lora_b"][0]}, r"lora_b must be \[E, O, R\], got \[7, 3\]"),
    "lora_b mT": ({"lora_b": CASE["lora_b"].mT}, r"lora_b must be \[E=5, O=7, R=3\].*, got \[5, 3, 7\]"),
    "lora_b dtype": ({"lora_b": CASE["lora_b"].bool()}, r"lora_b must be float16.*, got bool"),
    "weights 1d": ({"weights": CASE["weights"][0]}, r"weights must be \[T, K\] or \[N, K\], got \[2\]"),
    "weights dtype": ({"weights": ids}, r"weights must be float16.*, got int32"),
    "weights empty": ({"weights": torch.zeros(0, 2), "experts": ids[:0]}, r"weights must have at least one row"),
    "rows of weights": ({"weights": torch.zeros(4, 2), "experts": ids[:4]}, r"T=6 must be a multiple of N=4"),
    "K of experts": ({"experts": ids[:, :1]}, r"experts must be \[6, K=2\] like weights, got \[6, 1\]"),
    "experts dtype": ({"experts": ids.long()}, r"experts must be int32, got int64"),
    "experts high": ({"experts": ids * 0 + 5}, r"experts must hold ids in \[0, E=5\), got 5 at \[0, 0\]"),
    "experts low": ({"experts": ids * 0 - 1}, r"experts must hold ids in \[0, E=5\), got -1 at \[0, 0\]"),
    "lora_bias": ({"lora_bias": torch.zeros(5, 8)}, r"lora_bias must be \[E=5, O=7\], got \[5, 8\]"),
    "lora_bias dtype": ({"lora_bias": torch.zeros(5, 7).int()}, r"lora_bias must be float16.*, got int32"),
    "rows dtype": ({"rows": torch.zeros(6)}, r"rows must be int32, got float32"),
    "rows size": ({"rows": torch.zeros(7).int()}, r"rows must be \[T=6\], got \[7\]"),
    "rows value": ({"rows": torch.full((6,), 6).int()}, r"rows must hold values in \[0, N=6\), got 6 for token 0"),
    "packed": ({"packed": torch.zeros(5, 44)}, r"packed must be \[E=5, R\*D \+ R\*O=45\] .*, got \[5, 44\]"),
    "packed strided": ({"packed": torch.zeros(45, 5).T}, r"packed must be contiguous"),
    "packed dtype": ({"packed": torch.zeros(5, 45).long()}, r"packed must be float16.*, got int64"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("op", [ops.lora_apply, ops.lora_apply_])
def test_wrong_arguments(op, case):
    changed, message = ERRORS[case]
    with pytest.raises(ValueError, match=rf"^moerge::{op.__name__}: .*" + message):
        op(**{**CASE, **changed})


def test_wrong_arguments_of_the_others():
    rest = [CASE["base"], CASE["x"], rand(5, 8), CASE["lora_a"], CASE["lora_b"]]
    with pytest.raises(ValueError, match=r"^moerge::routed_lora: top_k must be in \[1, E=5\], got 6"):
        ops.routed_lora(*rest, top_k=6)
    with pytest.raises(ValueError, match=r"^moerge::routed_lora: lora_a must be \[E=4, R, D\] to match gates"):
        ops.routed_lora(rest[0], rest[1], rest[2][:4], *rest[3:])
    with pytest.raises(ValueError, match=r"^moerge::routed_lora: lora_b must be \[E=5, O=7, R=3\]"):
        ops.routed_lora(*rest[:4], rest[4][:, :6])
    with pytest.raises(ValueError, match=r"^moerge::pack_experts: lora_b must be \[E=5, O, R=3\]"):
        ops.pack_experts(CASE["lora_a"], CASE["lora_b"].mT)
    with pytest.raises(ValueError, match=r"^moerge::pack_experts: lora_b must be float32, got float16"):
        ops.pack_experts(CASE["lora_a"], CASE["lora_b"].half())
    packed = ops.pack_experts(CASE["lora_a"], CASE["lora_b"])
    x = CASE["x"].clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^moerge::lora_apply: packed is for inference"):
        ops.lora_apply(**{**CASE, "x": x}, packed=packed)
    with pytest.raises(ValueError, match=r"^moerge::routed_lora: packed is for inference"):
        ops.routed_lora(rest[0], x, *rest[2:], packed=packed)


def test_a_bank_of_no_experts_is_the_base():
    base, x = torch.ones(2, 4, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    a, b = torch.ones(0, 2, 3, requires_grad=True), torch.ones(0, 4, 2, requires_grad=True)
    y = ops.lora_apply(base, x, a, b, torch.ones(2, 0), torch.ones(2, 0, dtype=torch.int32))
    assert torch.equal(y, base)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3)) and a.grad.shape == a.shape and b.grad.shape == b.shape


def test_the_reference_does_not_broadcast_the_base():
    with pytest.raises(ValueError, match="base must be"):
        reference.lora_apply(
            torch.ones(2, 1), torch.ones(2, 3), torch.ones(1, 2, 3), torch.ones(1, 4, 2), torch.ones(2, 1),
            torch.zeros(2, 1, dtype=torch.int32),
        )  # fmt: skip
