"""LoRA-Flow, MoLE and MeteoRA against their equations, computed by hand in float64."""

from __future__ import annotations

import copy
import pickle

import patch_cases as cases
import pytest
import torch
from router_cases import largest_error, top, trained
from torch.nn import functional

import moerge_ext as moerge


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("token_gates")
    model = cases.build("llama")
    return model, cases.bank("llama", model, root), root


def layer(path):
    return ".".join(path.split(".")[:3])


def test_lora_flow(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "flow", "lora_flow")
    t = {path: {n: v.double() for n, v in named.items()} for path, named in routers.tensors.items()}
    assert t.keys() == {"model.layers.0", "model.layers.1"} and all(v["bias"].abs().max() > 0.05 for v in t.values())

    def weights(path, u, h, outputs):
        return (h @ t[layer(path)]["gate"].T).softmax(-1) + t[layer(path)]["bias"]

    wrong, change = largest_error(model, experts, routers, weights)
    assert wrong < 1e-5 and change > 0.01
    assert largest_error(model, experts, routers, weights, backend="reference")[0] < 1e-5


@pytest.mark.parametrize("without", [None, "bee"])
@pytest.mark.parametrize("options", [{}, {"reads": "input"}, {"per": "layer"}])
def test_mole(setup, options, without):
    model, experts, root = setup
    routers = trained(model, experts, root / "mole", "mole", options=options, steps=4)

    def weights(path, u, h, outputs):
        place = layer(path) if options.get("per") == "layer" else path
        gate, tau = (routers.tensors[place][n].double() for n in ("gate", "log_temperature"))
        if options.get("per") == "layer":
            read = h
        elif options.get("reads") == "input":
            read = u
        else:
            flat = outputs.flatten(-2)
            read = functional.layer_norm(flat, flat.shape[-1:], eps=1e-5)
        scores = read @ gate.T / tau.exp()
        if without:
            scores[..., 1] = -torch.inf
        return scores.softmax(-1)

    wrong, change = largest_error(model, experts, routers, weights, without=without)
    assert wrong < 1e-5 and change > 0.01


def test_meteora(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "meteora", "meteora")

    def weights(path, u, h, outputs):
        return top(u @ routers.tensors[path]["gates"].double().T, 2)

    wrong, change = largest_error(model, experts, routers, weights)
    assert wrong < 1e-5 and change > 0.01


@pytest.mark.parametrize("method", ["lora_flow", "mole"])
def test_a_weighed_model_generates_is_copied_and_recorded(setup, method):
    model, experts, root = setup
    routers = trained(model, experts, root / f"again-{method}", method, steps=3)
    inputs = cases.batch("llama", rows=2, length=5)
    before = cases.snapshot(model)
    with moerge.patch(model, experts, method, routers=routers) as handle:
        want = cases.logits(model, **inputs)
        steps = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        whole = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        assert torch.equal(steps, whole)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(cases.logits(other, **inputs), want)
            moerge.get_handle(other).remove()
        with handle.record() as trace:
            cases.logits(model, **inputs)
        assert (trace.share() > 0).all()
        assert "torch computes them" in str(handle.explain())
        with handle.disabled():
            base = cases.logits(model, **inputs)
        assert not torch.equal(base, want)
        half = copy.deepcopy(model).bfloat16()
        gates = half.model.layers[0].self_attn.q_proj.weigher.gate
        assert gates.dtype == torch.float32
        assert cases.error(cases.logits(half, **inputs).float(), want) < 0.3
    assert cases.same(before, cases.snapshot(model))


def test_a_router_of_a_layer_refuses_cross_attention(tmp_path):
    model = cases.build("t5")
    experts = cases.bank("t5", model, tmp_path)
    data = [cases.batch("t5", labels=True)]
    as_many = [data[0] | {"labels": cases.tokens(*data[0]["input_ids"].shape, seed=1)}]
    for given in (data, as_many):
        with pytest.raises(RuntimeError, match="EncDecAttention.*no cross-attention"):
            moerge.train_routers(model, experts, given, tmp_path / "r", method="lora_flow", steps=1, progress=False)
    only = {p: m for p, m in experts.modules.items() if "EncDec" not in p}
    alone = moerge.ExpertBank(experts.names, only)
    moerge.train_routers(model, alone, data, tmp_path / "r", method="lora_flow", steps=1, progress=False)
