"""The rows of METHODS: plans, merges, options, GLIDER's bias and the table."""

from __future__ import annotations

import io
import math
import pickle
import re

import pytest
import torch
from method_cases import (
    MODULE,
    SIGMOID,
    D,
    E,
    O,
    both_kinds,
    branch,
    build,
    deltas,
    dense,
    make_bank,
    randn,
    random_bank,
    relative,
    route,
)
from rich.console import Console

from moerge_ext import reference
from moerge_ext.experts.kinds import SIGMOID_GATE
from moerge_ext.methods import METHODS, get_method
from moerge_ext.methods.base import standardize
from moerge_ext.methods.gating import gate_notes
from moerge_ext.methods.table import render, rows
from moerge_ext.methods.whole_models import WHOLE_MODELS

# ---------------------------------------------------------------------------- plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [*(n for n, m in METHODS.items() if m.learned is None), "expert:e2"])
def test_every_method_builds_a_plan(name, dtype):
    bank = both_kinds(random_bank(dtype, bias=randn(E, O, seed=9, dtype=dtype)))
    plan, routing, aggregation, _ = build(name, bank)
    count = plan.lora_A.shape[0]
    assert plan.lora_A.shape == (count, plan.lora_A.shape[1], D)
    assert plan.lora_B.shape == (count, O, plan.lora_A.shape[1])
    assert plan.lora_B.mT.is_contiguous() and plan.lora_A.mT.is_contiguous()
    assert plan.lora_A.dtype == plan.lora_B.dtype == plan.lora_bias.dtype == dtype
    assert plan.lora_bias.shape == (count, O)
    assert aggregation in ("output", "factored")
    if routing is None:
        assert count == 1 and plan.gates is None
        assert plan.weights.shape == (1,) and plan.weights.dtype == torch.float32
    else:
        assert count == E and plan.weights is None and plan.mask is None
        assert plan.gates.shape == (E, D) and plan.gates.dtype == torch.float32 and plan.gates.is_contiguous()
        scale = routing.resolved_scale(D, E)
        assert scale is None or (math.isfinite(scale) and scale > 0)


@pytest.mark.parametrize("value", [3.3, 1e-4, 1000.7])
def test_a_constant_gate_standardizes_to_zeros(value):
    """Exactly: what is left by rounding would be divided by almost nothing."""
    assert not standardize(torch.full((2, 577), value)).any()


@pytest.mark.parametrize("name", ["phatgoose", "average_activation", "glider", "glider_code"])
def test_stored_gates_are_standardized_once(name):
    bank = both_kinds(random_bank())
    kind = get_method(name).gate_kind
    plan, *_ = build(name, bank)
    stored = bank.modules[MODULE].gates[kind].double()
    want = (stored - stored.mean(1, keepdim=True)) / (stored.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(plan.gates.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.gate_kind])
def test_missing_gates_are_named_with_the_mend(name):
    kind = get_method(name).gate_kind
    bank = random_bank(kind=kind, present=[1, 1, 1, 0, 1], has_gate=[True, False, True, False, False])
    bank.folders = (None, "/adapters/one", None, None, None)
    with pytest.raises(ValueError) as caught:
        build(name, bank)
    text = str(caught.value)
    assert MODULE in text and kind in text and "2 of 4" in text
    assert "'e1' (/adapters/one), 'e4'" in text and "'e3'" not in text
    assert ("train_gates(" if kind == SIGMOID else "--kind average-activation") in text
    with pytest.raises(ValueError, match="5 of 5: 'e0', 'e1'"):
        build(name, random_bank(gates=None))


# under twin_merging an expert without the module is one whose update is zero there, see test_twin.py
ROUTED = [name for name, row in METHODS.items() if row.routing is not None and row.learned is None]


@pytest.mark.parametrize("name", [name for name in ROUTED if name != "twin_merging"])
def test_experts_without_the_module_are_masked(name):
    kind = get_method(name).gate_kind or SIGMOID
    bank = random_bank(kind=kind, present=[1, 0, 1, 1, 0], has_gate=[True, False, True, True, False])
    plan, routing, *_ = build(name, bank)
    assert plan.mask.tolist() == [True, False, True, True, False]
    # where the weights are given, three experts of 1/3 or one of 1
    bias = torch.full((1, E), 1 if routing.top_k == 1 else 1 / 3) if routing.weighting == "score" else None
    weights, experts = route(plan, routing, randn(33, D, seed=7), bias)
    assert dense(weights, experts, E)[:, [1, 4]].eq(0).all()
    if routing.weighting != "softmax_all":
        torch.testing.assert_close(weights.sum(-1), torch.ones(33), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- merges and fixed experts

CASES = {
    "plain": {},
    "mixed ranks": {"ranks": [4, 1, 2, 4, 3]},
    "missing": {"present": [True, False, True, True, False]},
    "mixed and missing": {"ranks": [4, 1, 2, 4, 3], "present": [False, True, True, True, True]},
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_mean_of_the_outer_products(case, with_bias):
    bank = random_bank(bias=randn(E, O, seed=9) if with_bias else None, **CASES[case])
    x = randn(6, D, seed=7)
    want = x.double() @ deltas(bank).mean(0).T
    if with_bias:
        want = want + bank.modules[MODULE].lora_bias.double().mean(0)
    assert relative(branch("merged", bank, x), want) < 1e-6
    assert build("merged", bank)[0].lora_A.shape[1] == sum(bank.modules[MODULE].ranks)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_factors_is_the_product_of_the_means(case, with_bias):
    bank = random_bank(bias=randn(E, O, seed=9) if with_bias else None, **CASES[case])
    module, x = bank.modules[MODULE], randn(6, D, seed=7)
    want = x.double() @ (module.lora_B.double().mean(0) @ module.lora_A.double().mean(0)).T
    if with_bias:
        want = want + module.lora_bias.double().mean(0)
    assert relative(branch("merged_factors", bank, x), want) < 1e-6


def test_merged_of_many_small_float16_experts_does_not_underflow():
    count = 64
    bank = make_bank(randn(count, 2, D, seed=1).half(), (randn(count, O, 2, seed=2) * 1e-6).half())
    x = randn(3, D, seed=7)
    want = x.double() @ deltas(bank).mean(0).T
    plan, routing, *_ = build("merged", bank)
    weights, experts = route(plan, routing, x)
    got = reference.lora_apply(torch.zeros(3, O), x, plan.lora_A.float(), plan.lora_B.float(), weights, experts)
    assert relative(got, want) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_fixed_expert_is_that_expert_alone(case):
    bank = random_bank(bias=randn(E, O, seed=9), **CASES[case])
    module, x = bank.modules[MODULE], randn(6, D, seed=7)
    for e in range(E):
        plan, *_ = build(f"expert:e{e}", bank)
        here = bool(module.present[e])
        assert plan.weights.tolist() == [float(here)]
        assert plan.lora_A.shape[1] == (module.ranks[e] if here else 1)
        assert plan.lora_A.untyped_storage().nbytes() == plan.lora_A.nbytes, "the whole bank stays alive"
        want = x.double() @ deltas(bank)[e].T + module.lora_bias[e].double()
        torch.testing.assert_close(branch(f"expert:e{e}", bank, x).double(), want, rtol=1e-5, atol=1e-5)


def test_unknown_expert_lists_the_names():
    with pytest.raises(ValueError, match="no expert named 'nobody'; there are: e0, e1, e2, e3, e4"):
        build("expert:nobody", random_bank())


def test_plans_do_not_change_the_bank():
    bank = both_kinds(random_bank(bias=randn(E, O, seed=9)))
    module = bank.modules[MODULE]
    before = [t.clone() for t in (module.lora_A, module.lora_B, module.lora_bias, module.gates[SIGMOID])]
    for name in [*(name for name, method in METHODS.items() if method.learned is None), "expert:e1"]:
        build(name, bank)
    for old, new in zip(before, (module.lora_A, module.lora_B, module.lora_bias, module.gates[SIGMOID]), strict=True):
        assert torch.equal(old, new)


# ---------------------------------------------------------------------------- options


def test_get_method_lists_what_there_is():
    for name, method in METHODS.items():
        assert get_method(name) is method and method.name == name
    assert get_method("expert:x").name == "expert:x"
    for unknown in ("what", "", None):
        with pytest.raises(ValueError) as caught:
            get_method(unknown, ["base"])
        assert all(known in str(caught.value) for known in [*METHODS, "expert:<name>", "base"])
    for unknown, meant in (("fatgoose", "phatgoose"), ("expert:", "expert:<name>"), ("bsae", "base")):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
            get_method(unknown, ["base"])


@pytest.mark.parametrize(
    ("name", "overrides", "parts"),
    [
        ("phatgoose", {"temperature": 2}, ["unknown option(s) temperature", "top_k", "aggregation"]),
        ("phatgoose", {"top_k": 0, "top_p": 2.0}, ["top_k", "top_p"]),
        ("phatgoose", {"aggregation": "sum"}, ["'output' or 'factored'", "'sum'"]),
        (
            "arrow",
            {"temperature": 0, "prototype": "qr"},
            ["temperature", "0", "svd, power_iteration", "'qr'"],
        ),
        ("arrow", {"temperature": math.inf}, ["temperature", "inf"]),
        ("arrow", {"scale": 0.5}, ["temperature", "scale=0.5"]),
        ("arrow_peft", {"iterations": 0, "seed": None}, ["iterations", "seed"]),
        ("average_activation", {"gate_norm": "layer"}, ["gate_norm", "'layer'"]),
        ("merged", {"top_k": 2}, ["unknown option(s) top_k"]),
        ("glider", {"threshold": "high", "gamma": math.nan}, ["threshold", "'high'", "gamma", "nan"]),
        ("glider_code", {"beta": 3}, ["unknown option(s) beta", "alpha"]),
        ("phatgoose", {"top_p": "abc", "scale": "abc"}, ["top_p", "scale", "'abc'"]),
        ("phatgoose", {"top_p": math.nan, "scale": math.inf}, ["top_p", "nan", "scale", "inf"]),
        ("phatgoose", {"top_p": True, "scale": True, "top_k": True}, ["top_p", "scale", "top_k", "True"]),
        ("phatgoose", {"absolute": "no", "top_k": "2"}, ["absolute must be True or False, got 'no'", "top_k"]),
        ("arrow", {"scale_by_width": "abc", "iterations": True}, ["scale_by_width", "'abc'", "iterations"]),
        ("arrow", {"seed": False}, ["seed must be an integer, got False"]),
        ("arrow", {"self": 1}, ["unknown option(s) self"]),
        ("phatgoose", {"methd": "arrow"}, ["unknown option(s) methd; did you mean method? It takes "]),
        ("arrow", {"temprature": 2, "bakend": 1}, ["did you mean backend, temperature?"]),
        ("phatgoose", {"backend": "reference"}, ["unknown option(s) backend; it takes"]),
    ],
)
def test_configure_names_every_bad_option(name, overrides, parts):
    with pytest.raises(ValueError) as caught:
        get_method(name).configure(**overrides)
    assert all(part in str(caught.value) for part in [f"'{name}'", *parts]), str(caught.value)


def test_configured_scales():
    def scale(name, **overrides):
        return get_method(name).configure(**overrides)[0].resolved_scale(64, 9)

    assert scale("phatgoose") is None  # route's own 1/sqrt(D)
    assert scale("arrow") == 1.0
    assert scale("arrow", temperature=4) == 0.25
    assert scale("arrow", temperature=4, scale_by_width=True) == pytest.approx(1 / 32)
    assert scale("arrow_phatgoose") == pytest.approx(1 / 80)
    assert scale("average_activation_mttl") == pytest.approx(1 / 8)
    assert scale("glider") == pytest.approx(1 / (64 * 3))
    assert scale("glider_code") == pytest.approx(1 / 8)
    assert scale("phatgoose", scale=0.5) == 0.5
    assert scale("phatgoose", scale=lambda d, e: d / e) == 64 / 9
    for wrong in (math.nan, "abc", None, True):
        with pytest.raises(ValueError, match=r"scale\(D=64, E=9\) must be a finite number"):
            scale("phatgoose", scale=lambda d, e, wrong=wrong: wrong)


def test_methods_can_be_pickled():
    for method in [*METHODS.values(), get_method("expert:e1")]:
        copy = pickle.loads(pickle.dumps(method))
        assert copy.name == method.name and copy.configure()[0] == method.configure()[0]


# ---------------------------------------------------------------------------- GLIDER's bias


def test_glider_alpha_is_chosen_per_row():
    affinities = torch.tensor([[0.81, 0.1], [0.79, 0.79], [0.8, -1.0], [-0.5, 0.9]], dtype=torch.float64)
    routing, _, options = get_method("glider").configure()
    bias = get_method("glider").bias(affinities, options)
    assert bias.dtype == torch.float32 and bias.shape == affinities.shape
    alpha = torch.tensor([103.0, 3.0, 3.0, 103.0])[:, None]  # 0.8 itself is not above the threshold
    torch.testing.assert_close(bias, (alpha * affinities).float())
    _, _, options = get_method("glider").configure(threshold=0.5, gamma=7, beta=1)
    want = torch.tensor([8.0, 8.0, 8.0, 8.0])[:, None] * affinities
    torch.testing.assert_close(get_method("glider").bias(affinities, options), want.float())


def test_glider_bias_is_differentiable_and_constant_for_the_code():
    affinities = torch.tensor([[0.9, 0.1], [0.2, 0.3]], requires_grad=True)
    get_method("glider").bias(affinities, get_method("glider").options).sum().backward()
    assert affinities.grad.tolist() == [[103.0, 103.0], [3.0, 3.0]]
    method = get_method("glider_code")
    torch.testing.assert_close(method.bias(affinities, {"alpha": 100.0}), affinities * 100)


def test_glider_score_is_alpha_affinity_plus_cosine():
    bank = both_kinds(random_bank())
    plan, routing, _, options = build("glider", bank, weighting="score", top_k=None)
    x, affinities = randn(8, D, seed=7), torch.rand(2, E, generator=torch.Generator().manual_seed(8))
    weights, experts = route(plan, routing, x, get_method("glider").bias(affinities, options))
    cosine = torch.nn.functional.cosine_similarity(standardize(x)[:, None], plan.gates[None], dim=-1)
    alpha = (affinities.amax(-1, keepdim=True) > 0.8) * 100 + 3
    want = cosine / math.sqrt(E) + (alpha * affinities).repeat_interleave(4, 0)
    torch.testing.assert_close(dense(weights, experts, E), want, rtol=1e-4, atol=1e-5)


def test_glider_by_the_letter_takes_the_softmax_before_top_k():
    """softmax over all E, the two largest kept as they are; `glider` divides them by their sum."""
    bank = both_kinds(random_bank())
    x, affinities = randn(8, D, seed=7), torch.full((1, E), 0.5)
    plan, routing, _, options = build("glider_softmax_all", bank)
    bias = get_method("glider_softmax_all").bias(affinities, options)
    scores = torch.nn.functional.cosine_similarity(standardize(x)[:, None], plan.gates[None], dim=-1) / math.sqrt(E)
    largest = (scores + bias).softmax(-1).topk(2)
    weights, experts = route(plan, routing, x, bias)
    assert torch.equal(experts.long(), largest.indices) and weights.sum(-1).max() < 0.9
    torch.testing.assert_close(weights, largest.values, rtol=1e-4, atol=1e-5)
    renormalized, _ = route(*build("glider", bank)[:2], x, bias)
    torch.testing.assert_close(renormalized, weights / weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_gates_that_were_never_trained_are_warned_of():
    """Zeros standardize to zeros: such an expert would score 0 for every token, silently."""
    gates = randn(E, D, seed=3)
    gates[1], gates[3] = 0, 0.5
    bank = random_bank(gates=gates, has_gate=[True, True, True, True, False])
    (note,) = gate_notes(bank, SIGMOID_GATE)
    assert re.match("all gates of kind 'sigmoid-gate' of 'e1', 'e3' are constant.*moerge train-gates", note)
    assert get_method("phatgoose").lacks(bank)  # e4 has none at all
    assert not get_method("glider").lacks(random_bank()) and not gate_notes(random_bank(), SIGMOID_GATE)


def test_gamma_97_is_the_other_reading_of_alpha():
    affinities = torch.tensor([[0.81, 0.1], [0.79, 0.2]])
    _, _, options = get_method("glider").configure(gamma=97)
    want = torch.tensor([[100.0], [3.0]]) * affinities
    torch.testing.assert_close(get_method("glider").bias(affinities, options), want)


# ---------------------------------------------------------------------------- given weights


def test_given_weights_are_used_as_they_are():
    bank, x = random_bank(bias=randn(E, O, seed=9)), randn(6, D, seed=7)
    weights = torch.tensor([[0.0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0.5, 0, -1.5, 0, 0.25]])
    got, module = branch("given", bank, x, affinities=weights), bank.modules[MODULE]
    each = torch.einsum("eod,td->teo", deltas(bank), x.double()) + module.lora_bias.double()
    want = torch.einsum("te,teo->to", weights.double().repeat_interleave(2, 0), each)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert got[:2].eq(0).all()
    alone = branch("given", bank, x, affinities=weights[1:2], top_k=1)
    torch.testing.assert_close(alone.double(), each[:, 1], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- the table

VOCABULARY = {
    "expert_training": {"Standard", "Custom", "Multiple"},
    "expert_data": {"Private", "Shared", "Multiple"},
    "routing_dataset": {"None", "Expert", "Target", "General", "Multiple"},
    "input_granularity": {"Step", "Example", "Task", "N/A", "Multiple"},
    "depth": {"Module", "Model", "N/A", "Multiple"},
    "selection": {"Sparse", "Dense", "None"},
    "aggregation": {"Output", "Parameter", "None", "Multiple"},
    "generalization": {"In-Distribution", "Out-of-Distribution", "Multiple"},
    "user_dataset": {"Zero-Shot", "Few-Shot", "Full", "Multiple"},
}


def test_the_table_is_complete():
    asked = {"phatgoose", "arrow", "arrow_phatgoose", "average_activation", "merged", "merged_factors"}
    assert asked | {"glider", "glider_code"} <= set(METHODS)
    table = rows()
    assert [row["name"] for row in table] == [*METHODS, "expert:<name>", *WHOLE_MODELS]
    for row in table:
        assert all(isinstance(value, str) and value for key, value in row.items() if key != "taxonomy"), row
        assert "arXiv" in row["paper"]
        assert set(row["taxonomy"]) == set(VOCABULARY)
        for column, value in row["taxonomy"].items():
            assert value in VOCABULARY[column], (row["name"], column, value)


def test_the_table_reads_at_120_columns():
    def text(**kwargs):
        console = Console(width=120, file=io.StringIO(), color_system=None)
        render(console, **kwargs)
        return console.file.getvalue()

    short, full = text(), text(verbose=True)
    assert max(map(len, full.splitlines())) <= 120 and "…" not in full
    assert all(name in short for name in [*METHODS, "expert:<name>", "2402.05859"])
    assert len(short) < len(full) and "Out-of-Distribution" in full and "temperature=10.0" in full
