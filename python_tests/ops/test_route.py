"""moerge::route against the reference and against its contract."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import FLOATS, LAYOUTS, check_route, rand, router

from moerge_ext import ops, reference

NAN, INF = float("nan"), float("inf")


SHAPES = [  # T, D, E, K
    (0, 8, 2, 1), (1, 1, 1, 1), (1, 64, 7, 2), (2, 8, 2, 2), (33, 37, 7, 7), (129, 200, 36, 9), (33, 64, 166, 4),
    (1000, 63, 36, 8), (2, 4096, 166, 166), (129, 4096, 7, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
def test_shapes(shape, normalize):
    T, D, E, K = shape
    check_route(*router(T, D, E), top_k=K, normalize=normalize)


@pytest.mark.parametrize("x", FLOATS)
@pytest.mark.parametrize("gates", FLOATS)
def test_dtypes(x, gates):
    weights, _ = check_route(*router(33, 61, 7, x, gates), top_k=3, weighting="softmax_all")
    assert weights.dtype == (torch.float64 if x == torch.float64 else torch.float32)


@pytest.mark.parametrize("weighting", ["softmax", "softmax_all", "sigmoid", "score"])
@pytest.mark.parametrize("top_p", [None, 0.6])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("per_row_mask", [None, False, True])
def test_options(weighting, top_p, absolute, per_row_mask):
    T, E, N = 36, 9, 4
    x, gates = router(T, 24, E)
    mask = None
    if per_row_mask is not None:
        mask = rand(N, E, seed=11) > 0
        mask[1] = False
        mask = mask if per_row_mask else mask[0]
    options = {"top_k": 5, "absolute": absolute, "top_p": top_p, "weighting": weighting, "mask": mask, "scale": 0.4}
    check_route(x, gates, bias=rand(N, E, seed=12), **options)
    rows = torch.randint(0, N, (T,), generator=torch.Generator().manual_seed(1)).int()
    check_route(x, gates, bias=rand(N, E, seed=12), rows=rows, **options)
    if not per_row_mask:
        check_route(x, gates, **options)


def test_equation():
    """The router of PHATGOOSE, written without the reference: softmax of the top 2 of LN(u) . g / sqrt(D)."""
    x, gates = router(50, 48, 6)
    scores = torch.nn.functional.layer_norm(x, (48,), eps=1e-5) @ gates.T / math.sqrt(48)
    best = scores.topk(2)
    weights, experts = ops.route(x, gates)
    torch.testing.assert_close(weights, best.values.softmax(-1))
    assert torch.equal(experts.long(), best.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [63, 4096])
def test_statistics_survive_a_large_mean(dtype, D):
    x = (1000 + 0.5 * rand(17, D, seed=3)).to(dtype)
    gates = rand(5, D, seed=4)
    gates += 10  # gates that are not centred: an error of the mean would show
    weights, _ = ops.route(x, gates, top_k=5, weighting="score")
    truth, _ = reference.route(x.double(), gates.double(), top_k=5, weighting="score")
    assert (weights - truth).abs().max() < (2e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("T", [5, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_survive_features_that_are_not_alike(dtype, T):
    """The first ones far from the rest, all the same, one of them huge: whatever mean a kernel begins with."""
    x = 1000 + rand(T, 512, seed=3)
    x[:, :32] = 0
    x[1] = 1e6 / 3
    x[2] = rand(512, seed=5)
    x[2, 3] = 1e4
    x[3, :16], x[3, 16:32] = -3e4, 3e4
    x, gates = x.to(dtype), rand(5, 512, seed=4) + 1
    weights, _ = ops.route(x, gates, top_k=5, weighting="score")
    truth, _ = reference.route(x.double(), gates.double(), top_k=5, weighting="score")
    assert (weights - truth).abs().max() < 2e-5


def test_unit_of_zero_and_tiny_tokens():
    x = torch.stack([torch.zeros(8), torch.full((8,), 1e-20), torch.full((8,), 1e30)])
    weights, _ = ops.route(x, rand(3, 8, seed=1), top_k=3, normalize="unit", weighting="score")
    truth, _ = reference.route(x.double(), rand(3, 8, seed=1).double(), top_k=3, normalize="unit", weighting="score")
    torch.testing.assert_close(weights, truth.float())


@pytest.mark.parametrize("K", [1, 3, 8, 9, 12])
def test_ties_go_to_the_lower_id(K):
    x, gates = router(20, 16, 4)
    weights, experts = ops.route(x, gates.repeat(3, 1), top_k=K, weighting="score")
    truth, ids = reference.route(x, gates.repeat(3, 1), top_k=K, weighting="score")
    assert torch.equal(experts, ids)
    zeros, experts = ops.route(torch.zeros(3, 16), gates.repeat(3, 1), top_k=K)
    assert torch.equal(experts, torch.arange(K).int().expand(3, K))
    torch.testing.assert_close(zeros, torch.full((3, K), 1 / K))


@pytest.mark.parametrize("weighting", ["softmax", "softmax_all", "sigmoid", "score"])
@pytest.mark.parametrize("K", [2, 12])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_token_is_alone(weighting, K, bad):
    x, gates = router(40, 16, 12)
    clean = ops.route(x, gates, top_k=K, weighting=weighting)
    x = x.clone()
    x[17, 3] = bad
    weights, experts = ops.route(x, gates, top_k=K, weighting=weighting)
    assert weights[17].isnan().all() and torch.equal(experts[17], torch.arange(K).int())
    others = torch.arange(40) != 17
    assert torch.equal(weights[others], clean[0][others]) and torch.equal(experts[others], clean[1][others])


@pytest.mark.parametrize("K", [3, 10])
def test_nan_scores_rank_last(K):
    x, gates = router(21, 16, 12)
    gates[0], gates[5, 2] = NAN, NAN
    weights, experts = ops.route(x, gates, top_k=K)
    assert not weights.isnan().any() and not ((experts == 0) | (experts == 5)).any()
    weights, experts = ops.route(x, gates, top_k=12, weighting="score")
    assert torch.equal(experts[:, -2:], torch.tensor([0, 5]).int().expand(21, 2)) and weights[:, -2:].isnan().all()
    # minus infinity is a number, so it comes before NaN; a masked NaN is not seen at all
    bias = torch.zeros(1, 12)
    bias[0, 7] = -INF
    _, experts = ops.route(x, gates, top_k=12, weighting="score", bias=bias)
    assert torch.equal(experts[:, -3:], torch.tensor([7, 0, 5]).int().expand(21, 3))
    mask = ~gates.isnan().any(-1)
    for weighting in ("softmax", "softmax_all"):
        assert ops.route(x, gates, top_k=K, mask=mask, weighting=weighting, top_p=0.9)[0].isfinite().all()


@pytest.mark.parametrize("weighting", ["softmax", "softmax_all", "sigmoid", "score"])
@pytest.mark.parametrize("K", [4, 10])
def test_unused_slots(weighting, K):
    """Fewer than K eligible: weight exactly 0 and the lowest ids that no kept slot has."""
    x, gates = router(9, 16, 10)
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, [1, 8]] = True
    mask[1, 0] = True
    weights, experts = ops.route(x, gates, top_k=K, mask=mask, weighting=weighting)
    assert torch.equal(experts[6:], torch.arange(K).int().expand(3, K)) and (weights[6:] == 0).all()
    assert torch.equal(experts[3:6], torch.arange(K).int().expand(3, K)) and (weights[3:6, 1:] == 0).all()
    assert (experts[:3, :2].sort(-1).values == torch.tensor([1, 8])).all() and (weights[:3, 2:] == 0).all()
    assert torch.equal(experts[:3, 2:4], torch.tensor([0, 2]).int().expand(3, 2))
    assert all(len(set(row)) == K for row in experts.tolist())


def test_top_p_keeps_the_smallest_sufficient_set():
    x, gates = router(200, 24, 9)
    share = reference.route(x.double(), gates.double(), top_k=9, scale=0.5, weighting="softmax_all")[0]
    for p in (0.05, 0.5, 0.9, 0.999):
        weights, _ = ops.route(x, gates, top_k=9, scale=0.5, top_p=p)
        clear = ((share.cumsum(-1) - p).abs() > 1e-5).all(-1)
        wanted = (share.cumsum(-1) < p).sum(-1) + 1
        assert torch.equal((weights != 0).sum(-1)[clear], wanted[clear])
        torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    capped, _ = ops.route(x, gates, top_k=2, scale=0.5, top_p=0.999)
    torch.testing.assert_close(capped, ops.route(x, gates, top_k=2, scale=0.5)[0])


def test_extreme_scores_do_not_overflow():
    x, gates = router(5, 8, 4)
    for scale in (1e30, -1e30, 1e-30, 0.0):
        for weighting in ("softmax", "softmax_all", "sigmoid"):
            weights, experts = ops.route(x, gates, top_k=3, scale=scale, weighting=weighting)
            assert weights.isfinite().all() and (weights <= 1).all()
            assert torch.equal(experts, reference.route(x, gates, top_k=3, scale=scale)[1])


def test_rows_say_the_same_as_adjacent_tokens():
    x, gates = router(12, 16, 5)
    bias, mask = 3 * rand(4, 5, seed=3), rand(4, 5, seed=5) > -0.5
    rows = torch.arange(4).repeat_interleave(3).int()
    one = ops.route(x, gates, bias=bias, mask=mask)
    two = ops.route(x, gates, bias=bias, mask=mask, rows=rows)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = ops.route(x[order], gates, bias=bias, mask=mask, rows=rows[order])
    every = ops.route(x, gates, bias=bias[rows.long()], mask=mask[rows.long()])
    for got in (two, every):
        assert torch.equal(got[0], one[0]) and torch.equal(got[1], one[1])
    assert torch.equal(mixed[0], one[0][order]) and torch.equal(mixed[1], one[1][order])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_memory_layout_does_not_matter(layout, dtype):
    x, gates = router(12, 37, 5, dtype, dtype)
    bias, mask = rand(3, 5, seed=3, dtype=dtype), rand(3, 5, seed=4) > -1
    rows = torch.arange(12).int() % 3
    move = LAYOUTS[layout]
    want = ops.route(x, gates, bias=bias, mask=mask, rows=rows)
    got = ops.route(move(x), gates, bias=move(bias), mask=move(mask), rows=_every_second(rows))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    got = ops.route(x, move(gates), bias=bias, mask=mask, rows=rows)  # stored as [D,E], summed in another order
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1], want[1])
    one_row = x[:1].expand(12, -1)
    assert torch.equal(ops.route(one_row, gates)[0], ops.route(one_row.contiguous(), gates)[0])


def _every_second(rows):
    return rows.repeat_interleave(2)[::2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [37, 64])
def test_a_token_does_not_see_its_batch(dtype, D, pytestconfig):
    """The same bits; on a GPU, where few tokens and many have kernels of their own, nearly."""
    cpu = not pytestconfig.getoption("--simt") and not pytestconfig.getoption("--cuda")
    x, gates = router(37, D, 11, dtype, dtype)
    weights, experts = ops.route(x, gates, top_k=3)
    for t in (0, 15, 16, 36):
        alone = ops.route(x[t : t + 1], gates, top_k=3)
        torch.testing.assert_close(alone[0][0], weights[t], **({"rtol": 0, "atol": 0} if cpu else {}))
        assert torch.equal(alone[1][0], experts[t])


X, G = router(6, 8, 5)
ERRORS = {
    "x one dimension": ({"x": X[0]}, r"x must be \[T, D\], got \[8\]"),
    "x integer": ({"x": X.long()}, r"x must be float16, bfloat16, float32 or float64, got int64"),
    "gates columns": ({"gates": G[:, :7]}, r"gates must be \[E, D=8\] to match x, got \[5, 7\]"),
    "gates 3d": ({"gates": G[None]}, r"gates must be \[E, D=8\] to match x, got \[1, 5, 8\]"),
    "gates bool": ({"gates": G > 0}, r"gates must be float16.*, got bool"),
    "top_k 0": ({"top_k": 0}, r"top_k must be in \[1, E=5\], got 0"),
    "top_k E+1": ({"top_k": 6}, r"top_k must be in \[1, E=5\], got 6"),
    "normalize": ({"normalize": "layer"}, r"normalize must be 'standardize', 'unit' or 'none', got 'layer'"),
    "weighting": ({"weighting": "top"}, r"weighting must be 'softmax'.*got 'top'"),
    "top_p 0": ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
    "top_p above 1": ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    "top_p nan": ({"top_p": NAN}, r"top_p must be in \(0, 1\], got nan"),
    "bias columns": ({"bias": torch.zeros(2, 4)}, r"bias must be \[N, E=5\], got \[2, 4\]"),
    "bias integer": ({"bias": torch.zeros(2, 5).int()}, r"bias must be float16.*, got int32"),
    "bias no rows": ({"bias": torch.zeros(0, 5)}, r"bias must have at least one row, got \[0, 5\]"),
    "not divisible": ({"bias": torch.zeros(4, 5)}, r"T=6 must be a multiple of N=4"),
    "mask dtype": ({"mask": torch.ones(5)}, r"mask must be bool, got float32"),
    "mask size": ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask must be \[E=5\] or \[N, E=5\], got \[4\]"),
    "mask rows": (
        {"mask": torch.ones(3, 5, dtype=torch.bool), "bias": torch.zeros(2, 5)},
        r"mask must be .*N.*, got \[3, 5\]",
    ),
    "rows dtype": ({"bias": torch.zeros(2, 5), "rows": torch.zeros(6).long()}, r"rows must be int32, got int64"),
    "rows size": ({"bias": torch.zeros(2, 5), "rows": torch.zeros(5).int()}, r"rows must be \[T=6\], got \[5\]"),
    "rows value": (
        {"bias": torch.zeros(2, 5), "rows": torch.tensor([0, 1, 0, 2, 0, 0]).int()},
        r"rows must hold values in \[0, N=2\), got 2 for token 3",
    ),
    "rows negative": ({"bias": torch.zeros(2, 5), "rows": -torch.ones(6).int()}, r"rows must hold values .* got -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case):
    changed, message = ERRORS[case]
    with pytest.raises(ValueError, match=r"^moerge::route: .*" + message):
        ops.route(**{"x": X, "gates": G, **changed})


def test_no_tokens():
    for options in ({}, {"bias": torch.zeros(3, 5)}, {"bias": torch.zeros(0, 5), "rows": torch.zeros(0).int()}):
        weights, experts = ops.route(X[:0], G, **options)
        assert weights.shape == experts.shape == (0, 2) and experts.dtype == torch.int32


def test_rows_do_not_matter_when_nothing_is_per_row():
    x, gates = rand(6, 8), rand(3, 8, seed=1)
    rows = torch.arange(6).int()
    for mask in (None, torch.tensor([True, False, True])):
        for module in (ops, reference):
            want, got = module.route(x, gates, mask=mask), module.route(x, gates, mask=mask, rows=rows)
            assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])


@pytest.mark.parametrize("options", [{"top_k": 0}, {"top_k": 4}, {"top_p": 7.0}, {"normalize": "no"}])
def test_the_reference_refuses_what_the_op_refuses(options):
    for module in (ops, reference):
        with pytest.raises(ValueError, match=next(iter(options))):
            module.route(rand(6, 8), rand(3, 8, seed=1), **options)
