"""moerge::mix_log_probs against the reference and against its contract."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import FLOATS, LAYOUTS, assert_as_good, gradients, rand
from torch.autograd import gradcheck

from moerge_ext import ops, reference

NAN, INF = float("nan"), float("inf")


def mixture(K=3, N=5, V=41, dtype=torch.float32, weights=torch.float32):
    return {"logits": 3 * rand(K, N, V, seed=1, dtype=dtype), "weights": rand(N, K, seed=2).sigmoid().to(weights)}


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 41), (8, 2, 4097), (12, 3, 9000), (2, 0, 7), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_reference(shape, dtype):
    case = mixture(*shape, dtype, dtype)
    truth = reference.mix_log_probs(case["logits"].double(), case["weights"].double())
    got = ops.mix_log_probs(**case)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good(got, reference.mix_log_probs(**case), truth)


def test_equation():
    case = mixture(4, 6, 50)
    probs = case["logits"].softmax(-1)
    mean = torch.einsum("knv,nk->nv", probs, case["weights"] / case["weights"].sum(-1, keepdim=True))
    torch.testing.assert_close(ops.mix_log_probs(**case), mean.log())
    one = {"logits": case["logits"][:1], "weights": torch.full((6, 1), 0.3)}
    torch.testing.assert_close(ops.mix_log_probs(**one), case["logits"][0].log_softmax(-1))


def test_log_space_keeps_what_probabilities_lose():
    logits = torch.tensor([[[0.0, -300.0]], [[0.0, -310.0]]])
    got = ops.mix_log_probs(logits, torch.tensor([[0.5, 0.5]]))
    assert math.isclose(got[0, 1].item(), -300 - math.log(2) + math.log1p(math.exp(-10)), rel_tol=1e-6)
    big = ops.mix_log_probs(1e30 * rand(2, 3, 5), torch.ones(3, 2))
    assert not big.isnan().any() and (big <= 1e-6).all()


def test_zero_weight_is_not_read():
    case = mixture()
    case["weights"][:, 1] = 0
    case["weights"][2] = 0
    clean = ops.mix_log_probs(**case)
    case["logits"][1] = NAN
    case["logits"][:, 2] = INF
    assert torch.equal(ops.mix_log_probs(**case), clean)
    assert (clean[2] == -INF).all() and clean[[0, 1, 3, 4]].isfinite().all()
    _, grads = gradients(ops.mix_log_probs, case, ("logits", "weights"))
    assert grads["logits"].isfinite().all() and grads["weights"].isfinite().all()
    assert (grads["logits"][1] == 0).all() and (grads["weights"][:, 1] == 0).all()


def test_bad_logits_stay_in_their_row():
    case = mixture()
    clean = ops.mix_log_probs(**case)
    case["logits"][1, 3, 7] = NAN
    got = ops.mix_log_probs(**case)
    assert got[3].isnan().all() and torch.equal(got[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_forbidden_tokens():
    """Logits of -inf (a constrained vocabulary) give -inf where every expert forbids, and no NaN anywhere."""
    case = mixture()
    case["logits"][:, :, 3] = -INF
    case["logits"][0, :, 4] = -INF
    (got,), grads = gradients(ops.mix_log_probs, case, ("logits", "weights"))
    assert (got[:, 3] == -INF).all() and got[:, 4].isfinite().all()
    assert grads["logits"].isfinite().all() and grads["weights"].isfinite().all()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout):
    case = mixture(3, 5, 41)
    moved = {n: LAYOUTS[layout](t) for n, t in case.items()}
    want, got = (gradients(ops.mix_log_probs, c, ("logits", "weights")) for c in (case, moved))
    assert torch.equal(got[0][0], want[0][0])
    assert all(torch.equal(got[1][n], want[1][n]) for n in case)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("V", [41, 4099])
def test_gradients(dtype, V):
    case = mixture(3, 4, V, dtype, torch.bfloat16)
    names = ("logits", "weights")
    ours = gradients(ops.mix_log_probs, case, names)[1]
    plain = gradients(reference.mix_log_probs, case, names)[1]
    truth = gradients(reference.mix_log_probs, {n: t.double() for n, t in case.items()}, names)[1]
    for name in names:
        assert ours[name].dtype == case[name].dtype
        assert_as_good(ours[name], plain[name], truth[name], 5e-6)
    assert (case["weights"] * ours["weights"]).sum().abs() < 0.3  # scaling a row's weights changes nothing


def test_gradcheck():
    case = mixture(3, 2, 6, torch.float64, torch.float64)
    for needs in ((True, True), (True, False), (False, True)):
        args = [t.clone().requires_grad_(n) for t, n in zip(case.values(), needs, strict=True)]
        assert gradcheck(ops.mix_log_probs, args)
    case["weights"][0, 1] = 0
    assert gradcheck(lambda x: ops.mix_log_probs(x, case["weights"]), case["logits"].requires_grad_())


M = mixture()
ERRORS = {
    "logits 2d": ({"logits": M["logits"][0]}, r"logits must be \[K, N, V\], got \[5, 41\]"),
    "logits dtype": ({"logits": M["logits"].long()}, r"logits must be float16.*, got int64"),
    "weights transposed": ({"weights": M["weights"].T}, r"weights must be \[N=5, K=3\] to match logits, got \[3, 5\]"),
    "weights dtype": ({"weights": M["weights"].int()}, r"weights must be float16.*, got int32"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case):
    changed, message = ERRORS[case]
    with pytest.raises(ValueError, match=r"^moerge::mix_log_probs: " + message):
        ops.mix_log_probs(**{**M, **changed})
