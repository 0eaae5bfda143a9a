"""RAMoLE, AdapterFusion and MixDA against their equations, computed by hand in float64."""

from __future__ import annotations

import math

import patch_cases as cases
import pytest
import torch
from router_cases import E, batches, by_hand, largest_error, trained

import moerge_ext as moerge
from moerge_ext.methods.attention_gates import retrieved
from moerge_ext.training.routers.objective import Objective


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("attention_gates")
    model = cases.build("llama")
    return model, cases.bank("llama", model, root), root


def test_ramole(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "ramole", "ramole", options={"router_rank": 3})
    eligible = torch.ones(3, 1, E, dtype=torch.bool)
    eligible[0, 0, 1] = eligible[2, 0, 0] = False
    affinities = torch.tensor([[0.9, 0.1, 0.5], [1.0, 1.0, 1.0], [0.2, 0.3, 0.4]])
    eligible[1, 0, 2] = False  # of equals the first two

    def weights(path, u, h, outputs):
        a, b = (routers.tensors[path][n].double() for n in ("router_A", "router_B"))
        scores = torch.einsum("...o,...eo->...e", u @ a.T @ b.T, outputs) / math.sqrt(outputs.shape[-1])
        return scores.masked_fill(~eligible, -torch.inf).softmax(-1)

    inputs = cases.batch("llama", rows=3, length=6, seed=9)
    with by_hand(model, experts, weights):
        want = cases.logits(model, **inputs)
    with moerge.patch(model, experts, "ramole", routers=routers, keep=2) as handle:
        with pytest.raises(RuntimeError, match="affinit"):
            cases.logits(model, **inputs)
        with handle.affinities(affinities):
            assert cases.error(cases.logits(model, **inputs), want) < 1e-5
        with handle.affinities(affinities), handle.record() as trace:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert all(load.sum() > 0 for load in trace.load().values())


def test_retrieval_keeps_the_best():
    scores = retrieved(torch.tensor([[0.1, 0.7, 0.3, 0.7]]), {"keep": 2})
    assert scores.tolist() == [[-math.inf, 0.0, -math.inf, 0.0]]
    assert retrieved(torch.zeros(2, 3), {"keep": None}).tolist() == [[0.0] * 3] * 2
    assert retrieved(torch.zeros(1, 2), {"keep": 5}).tolist() == [[0.0, 0.0]]


def test_adapter_fusion(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "fusion", "adapter_fusion", lr=0.02)
    tensors = routers.tensors
    path = "model.layers.0.mlp.up_proj"
    assert (tensors[path]["value"] - torch.eye(48)).abs().max() > 0.02

    def weights(path, u, h, outputs):
        q, k = (tensors[path][n].double() for n in ("query_weight", "key"))
        return torch.einsum("...o,...eo->...e", u @ q.T, outputs @ k.T).softmax(-1)

    def value(path, summed):
        return summed @ tensors[path]["value"].double().T

    wrong, change = largest_error(model, experts, routers, weights, finish=value)
    assert wrong < 1e-5 and change > 0.01


def test_adapter_fusion_holds_its_value_matrix_near_the_identity(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "decay", "adapter_fusion", lr=0.02, steps=3)
    with moerge.patch(model, experts, "adapter_fusion", routers=routers) as handle, torch.no_grad():
        loss = Objective(handle)
        plain = loss(model, batches(1)[0])
        model.train()
        penalized = loss(model, batches(1)[0])
        model.eval()
    eyes = [named["value"] - torch.eye(len(named["value"])) for named in routers.tensors.values()]
    assert penalized.item() == pytest.approx(plain.item() + 0.01 * sum(d.square().sum().item() for d in eyes), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("ramole", {"router_rank": 0}, "router_rank must be a positive integer"),
        ("ramole", {"keep": 0}, "keep must be a positive integer or None"),
        ("mixda", {"task_rank": 0}, "task_rank must be a positive integer"),
        ("adapter_fusion", {"value_decay": -1}, "value_decay must not be negative"),
    ],
)
def test_bad_options(setup, method, options, said):
    model, experts, _ = setup
    with pytest.raises(ValueError, match=said):
        moerge.patch(model, experts, method, **options)


def test_mixda(setup):
    model, experts, root = setup
    routers = trained(model, experts, root / "mixda", "mixda", options={"hidden": 5, "task_rank": 3})
    inputs = {}

    def of(path):
        return {name: tensor.double() for name, tensor in routers.tensors[path].items()}

    def weights(path, u, h, outputs):
        t, inputs[path] = of(path), u
        return ((u @ t["fc1"].T + t["bias1"]).relu() @ t["fc2"].T + t["bias2"]).sigmoid()

    def with_task(path, summed):
        t = of(path)
        return summed + inputs[path] @ t["task_A"].T @ t["task_B"].T

    assert max(named["task_B"].abs().max() for named in routers.tensors.values()) > 0.05
    wrong, change = largest_error(model, experts, routers, weights, finish=with_task)
    assert wrong < 1e-5 and change > 0.01
