"""Plan + routing of the rows against the outputs of other implementations (../shared/conformance)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from method_cases import AVERAGE, branch, build, dense, make_bank, relative, route
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def conformance(shared):
    return lambda name: load_file(shared / "conformance" / f"{name}.safetensors")


def test_conformance_phatgoose_layer(conformance):
    data = conformance("phatgoose_layer")
    x = data["x"].reshape(-1, 64)
    bank = make_bank(data["layer1"].transpose(1, 2), data["layer2"].transpose(1, 2) / 16, gates=data["gates"].float())
    got = branch("phatgoose", bank, x, base=x @ data["W"].T)
    assert relative(got, data["out_top2"].reshape(-1, 48)) < 1e-5
    plan, routing, *_ = build("phatgoose", bank, top_k=None)
    assert relative(dense(*route(plan, routing, x), 7), data["weights_full_softmax"].reshape(-1, 7)) < 1e-5
    # The Arrow baseline of that code, with the stored vectors in the place of prototypes.
    plan, routing, *_ = build("arrow_phatgoose", bank, top_k=None)
    weights, experts = route(dataclasses.replace(plan, gates=data["gates"]), routing, x)
    assert relative(dense(weights, experts, 7), data["arrow_weights_T10"].reshape(-1, 7)) < 1e-5


def test_conformance_glider_layer(conformance):
    data = conformance("glider_layer")
    x, base = data["x"].reshape(-1, 64), data["x"].reshape(-1, 64) @ data["W"].T
    bank = make_bank(data["A"], data["B"] / 16, gates=data["gates_raw"])
    assert relative(build("glider_code", bank)[0].gates, data["gates_ln"]) < 1e-5
    affinities = data["global_cos"].expand(2, 7)
    for alpha in (0, 3, 100):
        got = branch("glider_code", bank, x, base=base, affinities=affinities, alpha=alpha)
        assert relative(got, data[f"out_scale{alpha}"].reshape(-1, 48)) < 1e-5
    for top_p in (0.25, 0.5, 0.75):
        got = branch("phatgoose", bank, x, base=base, top_k=None, top_p=top_p)
        assert relative(got, data[f"out_topp{top_p}"].reshape(-1, 48)) < 1e-5


def test_conformance_peft_arrow(conformance):
    data = conformance("peft_arrow")
    x, want = data["x"].reshape(-1, 64), data["delta"].reshape(-1, 48)
    bank = make_bank(data["A"], data["B"] * data["scaling"][:, None, None])
    plan, *_ = build("arrow_peft", bank, seed=7)
    assert relative(plan.gates, data["prototypes"]) < 1e-5
    assert relative(branch("arrow_peft", bank, x, seed=7), want) < 1e-5
    assert relative(branch("arrow", bank, x, top_k=3, gates=data["prototypes"]), want) < 1e-5
    cosines = (build("arrow", bank)[0].gates * data["prototypes"]).sum(-1).abs()
    assert 0.96 < cosines.min() < 0.97 and cosines.max() > 0.999  # 15 steps are not enough for every expert


def test_conformance_mttl_layer(conformance):
    data = conformance("mttl_layer")
    x, protos = data["x"].reshape(-1, 64), data["protos"]
    bank = make_bank(data["A"].transpose(1, 2), data["B"].transpose(1, 2) * 16 / 8, gates=protos)
    plan, routing, *_ = build("arrow_mttl", bank, top_k=2)
    weights, experts = route(dataclasses.replace(plan, gates=protos), routing, x)
    assert torch.equal(experts.long(), data["arrow_idx"].reshape(-1, 2))
    assert relative(weights, data["arrow_w"].reshape(-1, 2)) < 1e-5
    plan, routing, *_ = build("phatgoose", bank)
    weights, experts = route(plan, routing, x)
    assert torch.equal(experts.long(), data["phat_idx"].reshape(-1, 2))
    assert relative(weights, data["phat_w"].reshape(-1, 2)) < 1e-5
    after = branch("arrow", bank, x, top_k=2, gates=protos)
    before = branch("arrow_mttl", bank, x, top_k=2, gates=protos)
    want = (data["out_merge_after_True"] - data["out_merge_after_False"]).reshape(-1, 48)
    assert relative(after - before, want) < 1e-5
    bank = make_bank(data["A"].transpose(1, 2), data["B"].transpose(1, 2) * 16 / 8, gates=protos, kind=AVERAGE)
    plan, routing, *_ = build("average_activation_mttl", bank)
    assert relative(dense(*route(plan, routing, x), 6), data["avgact_w"].reshape(-1, 6)) < 1e-5
