"""The sizes at which the kernels for many tokens cut their work otherwise: parts, groups, tiles."""

from __future__ import annotations

import pytest
import torch
from op_cases import check_route, rand, router

from moerge_ext import ops, reference

NAN, INF = float("nan"), float("inf")
HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("E", [8, 9, 40, 41, 57, 166])
@pytest.mark.parametrize("x", [torch.float32, *HALVES])
def test_experts_of_a_block(E, x):
    """The last of several blocks may be nearly empty."""
    check_route(*router(33, 72, E, x), top_k=2, weighting="score")


@pytest.mark.parametrize("T", [256, 257, 1025])
@pytest.mark.parametrize("x", [torch.float32, *HALVES])
def test_tokens_of_a_block(T, x):
    """Warps that share their tokens' features, and warps with tokens of their own."""
    check_route(*router(T, 104, 9, x), top_k=3, weighting="score")


@pytest.mark.parametrize("D", [8, 32, 40, 512, 1192])
@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
@pytest.mark.parametrize("x", [torch.float32, *HALVES])
def test_parts_of_the_features(D, normalize, x):
    """Fewer chunks than warps, as many, more; the last one not full."""
    check_route(*router(18, D, 5, x), top_k=5, normalize=normalize, weighting="score")


@pytest.mark.parametrize("x", HALVES)
def test_far_from_zero_among_others(x):
    """Such tokens are taken around a pivot; those beside them need none."""
    tokens = rand(70, 520, seed=3)
    tokens[::5] += 40
    tokens[7] = 300
    tokens[9, 1:] = 0
    check_route(tokens.to(x), rand(7, 520, seed=4) + 1, top_k=7, weighting="score")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("x", [torch.float32, *HALVES])
def test_a_bad_token_changes_no_bit_of_its_neighbours(bad, x):
    tokens, gates = router(70, 264, 9, x)
    clean = ops.route(tokens, gates, top_k=3)
    for column in (0, 263):  # among those that a pivot is made of, and not
        tokens = tokens.clone()
        tokens[35, column] = bad
        weights, experts = ops.route(tokens, gates, top_k=3)
        others = torch.arange(70) != 35
        assert weights[35].isnan().all()
        assert torch.equal(weights[others], clean[0][others]) and torch.equal(experts[others], clean[1][others])


@pytest.mark.parametrize("E", [32, 33, 65, 256, 257, 300])
@pytest.mark.parametrize("K", [2, 33])
def test_experts_of_a_lane(E, K):
    """Scores in registers, one or more per lane, and scores in memory: ties, NaN, the sign of 0, masks."""
    x, gates = router(20, 16, E)
    K = min(K, E)  # noqa: N806
    check_route(x, gates, top_k=K, top_p=0.9)
    bias = torch.zeros(2, E)
    bias[:, 3::7] = -0.0
    bias[1, ::2] = -INF
    mask = torch.rand(2, E, generator=torch.Generator().manual_seed(5)) > 0.5
    gates = gates.repeat(1, 1)
    gates[1], gates[E // 2 :] = NAN, gates[: E - E // 2].clone()
    for tokens in (x, torch.zeros(20, 16)):
        for some in (None, mask):
            got = ops.route(tokens, gates, top_k=K, bias=bias, mask=some, weighting="score")
            want = reference.route(tokens, gates, top_k=K, bias=bias, mask=some, weighting="score")
            finite = want[0].isfinite()
            assert torch.equal(got[0].isfinite(), finite)
            torch.testing.assert_close(got[0][finite], want[0][finite])
            if tokens is not x:  # every score is 0, -0, NaN or -inf: nothing but ties
                assert torch.equal(got[1], want[1])
