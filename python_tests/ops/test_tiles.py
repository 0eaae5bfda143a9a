"""bfloat16 with enough tokens per expert, which some machines multiply as such: by the tiles of AMX or by vectors."""

import pytest
import torch
from op_cases import check_route, rand

from moerge_ext import ops, reference

# T, D, O, E, R, K: more than one block of tokens, chunk of columns, task of an expert, panel of ranks; odd ends of each
SHAPES = [
    (300, 576, 1040, 4, 16, 2), (67, 32, 16, 3, 32, 3), (513, 288, 544, 5, 64, 1), (2048, 64, 48, 160, 16, 2),
    (97, 64, 272, 7, 16, 2), (40, 96, 144, 4, 64, 2), (300, 576, 1040, 9, 16, 2),
    (300, 576, 1040, 4, 8, 2), (113, 1056, 80, 6, 24, 2), (29, 96, 528, 5, 40, 2),
]  # fmt: skip


def case(T, D, O, E, R, K):  # noqa: E741
    make = torch.Generator().manual_seed(T)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=make).bfloat16()

    experts = torch.rand(T, E, generator=make).argsort(1)[:, :K].int()
    weights = torch.rand(T, K, generator=make)
    weights[::7] = 0  # tokens without experts
    weights[3::5, 0] = 0
    a, b = normal(E, D, R).transpose(1, 2) * D**-0.5, normal(E, R, O).transpose(1, 2) * R**-0.5
    return normal(T, O), normal(T, D), a.transpose(1, 2).contiguous().transpose(1, 2), b, weights, experts


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(shape):
    base, x, a, b, weights, experts = case(*shape)
    want = reference.lora_apply(base.double(), x.double(), a.double(), b.double(), weights.double(), experts)
    y = ops.lora_apply(base, x, a, b, weights, experts)
    # every number is rounded to bfloat16 at least once; h once more
    assert error(y, want) < 2 * error(want.bfloat16(), want) + 1e-3
    assert torch.equal(y[::7], base[::7])
    ops.lora_apply_(base, x, a, b, weights, experts)
    assert torch.equal(base, y)


def test_routed_columns_of_a_wider_tensor_on_any_number_of_threads():
    base, x, a, b, *_ = case(*SHAPES[0])
    gates = torch.randn(x.shape[1], a.shape[0]).t()
    want, *_ = reference.routed_lora(base.double(), x.double(), gates.double(), a.double(), b.double())
    plain = torch.nn.functional.linear(x, gates.bfloat16())  # torch keeps tiles of its own
    wide = torch.full((len(base), base.shape[1] + 64), torch.nan, dtype=torch.bfloat16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            wide[:, 32:-32] = base
            ops.routed_lora_(wide[:, 32:-32], x, gates, a, b)
            found.append(wide[:, 32:-32].clone())
            assert wide[:, :32].isnan().all() and wide[:, -32:].isnan().all()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)
    assert torch.equal(torch.nn.functional.linear(x, gates.bfloat16()), plain)
    assert error(found[0], want) < 2 * error(want.bfloat16(), want) + 1e-3


def test_a_token_that_names_an_expert_twice_and_numbers_that_are_none():
    base, x, a, b, weights, experts = case(*SHAPES[0])
    experts[:, 1] = experts[:, 0]
    x[5] = torch.nan
    x[8, 3] = torch.inf
    want = reference.lora_apply(base.double(), x.double(), a.double(), b.double(), weights.double(), experts)
    y = ops.lora_apply(base, x, a, b, weights, experts)
    fine = torch.ones(len(x), dtype=torch.bool)
    fine[[5, 8]] = False
    assert error(y[fine], want[fine]) < 2 * error(want[fine].bfloat16(), want[fine]) + 1e-3
    assert y[5].isnan().all() and not y[8].isfinite().any()


@pytest.mark.parametrize("shape", SHAPES[4:7], ids=str)
def test_an_expert_of_infinite_numbers_is_felt_by_who_chose_it_alone(shape):
    """Few experts are multiplied all at once, where zero times infinity would reach every token."""
    base, x, a, b, weights, experts = case(*shape)
    want = ops.lora_apply(base, x, a, b, weights, experts)
    a, b = a.clone(), b.clone()
    a[1, 0, 3] = torch.nan
    b[2, 5, :] = torch.inf
    b[3, 7, 1] = torch.nan
    y = ops.lora_apply(base, x, a, b, weights, experts)
    chose = torch.stack([((experts == e) & (weights != 0)).any(1) for e in (1, 2, 3)])
    fine = ~chose.any(0)
    assert fine.sum() > len(x) // 5 and torch.isfinite(y[fine]).all()
    assert error(y[fine], want[fine].double()) < 0.01
    assert y[chose[0]].isnan().all() and y[chose[2] & ~chose[0], 7].isnan().all()
    assert not y[chose[1], 5].isfinite().any()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[6]], ids=str)
@pytest.mark.parametrize("strange", [False, True], ids=["finite", "an infinite expert"])
def test_routed_is_what_its_parts_are(shape, strange):
    """Also where router and branch take turns block by block."""
    base, x, a, b, *_ = case(*shape)
    gates = rand(a.shape[0], x.shape[1], seed=5)
    if strange:
        b[1, 2, 3] = torch.inf
    y, weights, experts = ops.routed_lora(base, x, gates, a, b, top_k=2)
    want = ops.route(x, gates, top_k=2)
    assert torch.equal(weights, want[0]) and torch.equal(experts, want[1])
    assert torch.equal(y, ops.lora_apply(base, x, a, b, weights, experts))
    assert y.isfinite().all() != strange


def test_tokens_that_share_memory_with_the_result():
    """Of other rows, of one row for all, of the same rows and of columns beside: as from a copy."""
    base, x, a, b, weights, experts = case(128, 64, 64, 4, 16, 2)
    both = torch.cat([base, x], 1)[:, :128].contiguous()
    rows = torch.cat([x, x[:1]])
    views = [
        (rows[1:], rows[:-1]), (rows[:-1], rows[1:]), (rows[:-1], rows[5:6].expand(128, 64)), (rows[1:], rows[1:]),
        (both[:, :64], both[:, 64:]), (both[:, 64:], both[:, :64]), (both[:, 16:80], both[:, :64]),
    ]  # fmt: skip
    for out, tokens in views:
        before = out._base.clone()
        want = ops.lora_apply(out.clone(), tokens.clone(), a, b, weights, experts)
        ops.lora_apply_(out, tokens, a, b, weights, experts)
        assert error(out, want.double()) < 0.005  # by another way, perhaps
        out._base.copy_(before)


def test_weights_that_cancel_hide_nothing():
    base, x, a, b, weights, experts = case(*SHAPES[0])
    experts[:, 1] = experts[:, 0]
    weights[:, 1] = -weights[:, 0]
    x[3] = torch.nan
    y = ops.lora_apply(base, x, a, b, weights, experts)
    assert y[3].isnan().all() == bool(weights[3, 0]) and torch.equal(y[4], base[4])


def test_a_token_without_experts_keeps_its_bits():
    """Minus zero too, where the result is another tensor and where it is the same."""
    base, x, a, b, weights, experts = case(*SHAPES[0])
    base[0] = -0.0
    base[7, :3] = torch.tensor([-0.0, torch.inf, 1e-39])
    before = base[::7].clone().view(torch.int16)
    assert torch.equal(ops.lora_apply(base, x, a, b, weights, experts)[::7].view(torch.int16), before)
    ops.lora_apply_(base, x, a, b, weights, experts)
    assert torch.equal(base[::7].view(torch.int16), before)


@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
@pytest.mark.parametrize("E", [1, 5, 8, 9, 16, 37])
def test_scores(E, normalize):
    """Gates expert by expert and side by side, columns that fill no tile, features in parts, a last block of one."""
    x = (rand(97, 544, seed=1) + torch.linspace(-3, 3, 97)[:, None]).bfloat16()  # means of all sizes
    wide = torch.full((97, 600), torch.nan, dtype=torch.bfloat16)
    wide[:, 8:552] = x
    gates = rand(E, 544, seed=2)
    for layout in (gates, gates.t().contiguous().t()):
        options = {"top_k": min(E, 2), "normalize": normalize, "weighting": "score"}
        weights, experts = check_route(x, layout, **options)
        again = ops.route(wide[:, 8:552], layout, **options)
        assert torch.equal(weights, again[0]) and torch.equal(experts, again[1])


@pytest.mark.parametrize("normalize", ["standardize", "unit", "none"])
def test_tokens_that_tiles_would_get_wrong_are_as_they_are_alone(normalize):
    """Far from zero, constant, too large to square, subnormal, infinite, none."""
    x, gates = rand(80, 544, seed=3, dtype=torch.bfloat16), rand(6, 544, seed=4)
    gates[2, 5] = 0.5  # a gate whose further parts are zero
    x[1] += 300
    x[2] = 7
    x[3] = 0
    x[4] *= 1e30
    x[5] = x[5].float() * 1e-39
    x[6, 5] = torch.inf
    x[7, 9] = torch.nan
    weights, experts = ops.route(x, gates, top_k=2, normalize=normalize)
    for i in range(10):
        alone = ops.route(x[i : i + 1], gates, top_k=2, normalize=normalize)
        assert torch.equal(experts[i], alone[1][0]), i
        torch.testing.assert_close(weights[i], alone[0][0], atol=2e-6, rtol=2e-6, equal_nan=True)
    check_route(x[8:], gates, top_k=2, normalize=normalize, weighting="score")


def test_the_best_two_of_few_experts():
    """As a sort finds them, also with equal scores and with numbers that are none."""
    make = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (500, 7), generator=make).float()
    scores[::9, 3] = torch.nan
    scores[::11, 2] = torch.inf
    scores[5:9] = -torch.inf
    scores[7, 4] = 1
    got, want = (
        backend.route(torch.zeros(500, 32), torch.zeros(7, 32), top_k=2, bias=scores, rows=torch.arange(500).int())
        for backend in (ops, reference)
    )
    assert torch.equal(got[1], want[1].int())
    torch.testing.assert_close(got[0], want[0], equal_nan=True)
