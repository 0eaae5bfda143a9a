"""Arrow prototypes against numpy's full SVD, and experts that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_cases import build, dense, make_bank, randn, route

from moerge_ext.methods.prototypes import power_iteration_prototypes, svd_prototypes


def numpy_prototype(a, b):
    return np.linalg.svd(b.double().numpy() @ a.double().numpy())[2][0]


@pytest.mark.parametrize("shape", [(8, 64, 48), (1, 5, 3), (16, 7, 40), (16, 40, 7), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_prototypes_equal_full_svd(shape, scale):
    rank, d, o = shape
    a, b = randn(6, rank, d, seed=1) * scale, randn(6, o, rank, seed=2) * scale
    prototypes, found = svd_prototypes(a, b)
    assert prototypes.dtype == torch.float32 and bool(found.all())
    for e in range(6):
        want = numpy_prototype(a[e], b[e])
        got = prototypes[e].double().numpy()
        assert abs(np.dot(want, got)) == pytest.approx(1, abs=1e-7)
        np.testing.assert_allclose(got * np.sign(np.dot(want, got)), want, atol=1e-6)
        assert got[np.abs(got).argmax()] > 0


def test_prototypes_of_rank_deficient_and_padded_factors():
    a, b = randn(3, 6, 30, seed=1), randn(3, 20, 6, seed=2)
    a[0, 3:] = a[0, :3]  # dependent rows
    b[1, :, 2:] = 0  # zero padding, on one side and on both
    a[2, 1:], b[2, :, 1:] = 0, 0
    prototypes, found = svd_prototypes(a, b)
    assert bool(found.all())
    for e in range(3):
        assert abs(np.dot(numpy_prototype(a[e], b[e]), prototypes[e].numpy())) == pytest.approx(1, abs=1e-6)


def test_an_expert_without_a_direction_is_found_and_masked():
    a, b = randn(5, 4, 30, seed=1), randn(5, 20, 4, seed=2)
    b[1] = 0  # a LoRA as initialised
    a[2] = 0
    a[3, 2:], b[3, :, :2] = 0, 0  # both nonzero, their product zero
    for prototypes, found in (svd_prototypes(a, b), power_iteration_prototypes(a, b)):
        assert found.tolist() == [True, False, False, False, True]
        assert torch.isfinite(prototypes).all() and prototypes[1:4].eq(0).all()
    plan, routing, *_ = build("arrow", make_bank(a, b), top_k=4)
    assert plan.mask.tolist() == [True, False, False, False, True]
    weights, experts = route(plan, routing, randn(9, 30, seed=5))
    assert torch.isfinite(weights).all()
    assert dense(weights, experts, 5)[:, 1:4].eq(0).all()


def test_prototypes_in_chunks_equal_one_batch(monkeypatch):
    a, b = randn(7, 4, 30, seed=1), randn(7, 20, 4, seed=2)
    whole = svd_prototypes(a, b)[0]
    monkeypatch.setattr("moerge_ext.methods.prototypes.CHUNK_ELEMENTS", 500)
    assert torch.equal(svd_prototypes(a, b)[0], whole)


def test_prototypes_from_bfloat16_factors():
    a, b = randn(4, 4, 30, seed=1, dtype=torch.bfloat16), randn(4, 20, 4, seed=2, dtype=torch.bfloat16)
    prototypes, _ = svd_prototypes(a, b)
    for e in range(4):
        assert abs(np.dot(numpy_prototype(a[e], b[e]), prototypes[e].numpy())) == pytest.approx(1, abs=1e-6)


def test_power_iteration_converges_to_the_exact_prototype():
    a, b = randn(6, 4, 30, seed=1), randn(6, 20, 4, seed=2)
    exact, _ = svd_prototypes(a, b)
    many, _ = power_iteration_prototypes(a, b, iterations=2000)
    assert ((exact * many).sum(-1).abs() - 1).abs().max() < 1e-5


def test_prototypes_under_autocast():
    a, b = randn(6, 4, 30, seed=1), randn(6, 20, 4, seed=2)
    for prototypes in (power_iteration_prototypes, svd_prototypes):
        want = prototypes(a, b)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prototypes(a, b)[0], want)
