"""Why a routed layer takes the way it takes: what is said agrees with what runs."""

from __future__ import annotations

import copy
import pickle
import weakref
from contextlib import nullcontext

import guard_cases
import patch_cases as cases
import pytest
import torch
from torch import nn

import moerge_ext as moerge
from moerge_ext import ops
from moerge_ext.routing import ways
from moerge_ext.routing.routed_linear import RoutedLinear


@pytest.fixture
def patched(tmp_path):
    model = cases.build("llama")
    experts = cases.bank("llama", model, tmp_path)
    return model, experts


def ran(monkeypatch, layer: RoutedLinear, x: torch.Tensor) -> str:
    """The way that a forward of the layer takes, seen by the calls it makes."""
    seen = []

    def watch(holder, name, way):
        real = getattr(holder, name)
        monkeypatch.setattr(holder, name, lambda *args, **kwargs: seen.append(way) or real(*args, **kwargs))

    watch(ops, "ROUTED_LINEAR_Y", ways.FUSED)
    watch(ops, "ROUTED_LORA_", ways.SHORT)
    for name in ("routed_lora_", "lora_apply_"):
        watch(ops, name, ways.IN_PLACE)
    for name in ("routed_lora", "lora_apply"):
        watch(ops, name, ways.APART)
    layer(x)
    monkeypatch.undo()
    return seen[0]


def hooked(layer):
    layer.base_layer.register_forward_pre_hook(lambda *_: None)


def watched(layer):
    layer.base_layer.register_forward_hook(lambda *_: None)


def replaced(layer):
    layer.base_layer.forward = nn.Linear.forward.__get__(layer.base_layer)


def recorded(layer):
    return layer.state.block(trace=moerge.Trace(tuple("abcdefgh"), False))


def foreign(layer):
    class Mine(nn.Linear):
        pass

    layer.base_layer.__class__ = Mine


@pytest.mark.parametrize(
    "change, way, said",
    [
        (lambda layer: None, ways.SHORT, "the weight has fewer than 65536 numbers, and stays in the caches"),
        (hooked, ways.IN_PLACE, "the base layer has forward hooks"),
        (watched, ways.APART, "a forward hook may keep the base layer's result"),
        (replaced, ways.IN_PLACE, "the base layer's forward was replaced"),
        (recorded, ways.APART, "handle.record() is on"),
        (foreign, ways.IN_PLACE, "the base layer is a Mine, not an nn.Linear"),
    ],
)
def test_what_is_said_is_what_runs(patched, change, way, said, monkeypatch):
    model, experts = patched
    moerge.patch(model, experts, "arrow", top_k=2)
    layer = next(m for m in model.modules() if isinstance(m, RoutedLinear))
    with change(layer) or nullcontext(), torch.no_grad():
        x = torch.randn(1, 3, layer.in_features)
        found, against = ways.way_of(layer, x)
        assert found == way and said in [reason for _, reasons in against for reason in reasons]
        assert ran(monkeypatch, layer, x) == way


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_tokens_on_a_cpu_are_one_op(dtype, monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256)).to(dtype)
    experts = guard_cases.experts(model, ["0"])
    x = torch.randn(17, 256).to(dtype)
    moerge.patch(model, experts, "arrow", top_k=2)
    layer = model[0]
    layer.backend = "reference"
    want = layer(x)
    layer.backend = "native"
    for tokens in (1, 2, 16, 17):
        way = ways.FUSED if tokens <= 16 else ways.SHORT
        assert ways.way_of(layer, x[:tokens])[0] == ran(monkeypatch, layer, x[:tokens]) == way
        limit = 1e-5 if dtype == torch.float32 else 4e-2
        torch.testing.assert_close(layer(x[:tokens]), want[:tokens], atol=limit, rtol=limit)
    with torch.enable_grad():
        said = str(ways.explain([layer]))
    assert ways.MEANING[ways.FUSED] in said and f"T = 512: {ways.MEANING[ways.SHORT]}; kernels for" in said


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_weight_is_left_to_torch(monkeypatch):
    model = nn.Sequential(nn.Linear(256, 256))
    moerge.patch(model, guard_cases.experts(model, ["0"]), "arrow", top_k=2)
    x, layer = torch.randn(2, 256), model[0]
    want = layer(x)
    layer.base_layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr())
    assert ways.way_of(layer, x)[0] == ran(monkeypatch, layer, x) == ways.SHORT
    assert "the weight is stored as sparse_csr" in str(ways.explain([layer]))
    torch.testing.assert_close(layer(x), want)


@torch.no_grad()
def test_what_is_kept_follows_the_weight(monkeypatch):
    """Its type, size and kind are looked at once for each weight, and the weight is not kept alive."""
    model = nn.Sequential(nn.Linear(256, 256))
    moerge.patch(model, guard_cases.experts(model, ["0"]), "arrow", top_k=2)
    x, layer = torch.randn(2, 256), model[0]
    assert ran(monkeypatch, layer, x) == ways.FUSED
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(monkeypatch, layer, x) == ways.SHORT and layer(x).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="same dtype"):
        layer(x.bfloat16())
    layer.weight.data, layer.bias.data = layer.weight.data.double(), layer.bias.data.double()
    assert ways.way_of(layer, x.double())[0] == ran(monkeypatch, layer, x.double()) == ways.SHORT
    old = weakref.ref(layer.weight)
    layer.base_layer._parameters["weight"] = nn.Parameter(layer.weight.half())
    layer.base_layer._parameters["bias"] = nn.Parameter(layer.bias.half())
    assert old() is None
    assert ways.way_of(layer, x.half())[0] == ran(monkeypatch, layer, x.half()) == ways.FUSED
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x.half()), layer(x.half()))


@torch.no_grad()
def test_outside_of_a_graph_while_torch_compiles(patched, monkeypatch):
    """torch says in every thread that it compiles while one does."""
    model, experts = patched
    moerge.patch(model, experts, "arrow", top_k=2)
    layer = next(m for m in model.modules() if isinstance(m, RoutedLinear))
    x = torch.randn(3, layer.in_features)
    want = layer(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(layer.state, "shown", lambda: None)
    torch.testing.assert_close(layer(x), want)


def test_gradients_keep_base_and_branch_apart(patched, monkeypatch):
    model, experts = patched
    handle = moerge.patch(model, experts, "arrow", top_k=2)
    layer = next(m for m in model.modules() if isinstance(m, RoutedLinear))
    assert ran(monkeypatch, layer, torch.randn(3, layer.in_features)) == ways.APART
    assert {way.way for way in handle.explain(grad=True)} == {ways.APART}
    assert "grad mode is on" in str(handle.explain(grad=True))


def test_one_kind_one_line(patched):
    model, experts = patched
    handle = moerge.patch(model, experts, "arrow", top_k=2)
    explained = handle.explain()
    assert sorted(name for way in explained for name in way.modules) == sorted(handle.modules)
    lines = str(explained).splitlines()
    assert len([line for line in lines if " x Linear " in line]) == len(explained) <= 4
    handle.remove()
    with pytest.raises(ValueError, match="removed"):
        handle.explain()


@pytest.mark.parametrize(
    "method, options, reason",
    [
        ("merged", {}, "the method routes nothing"),
        ("given", {}, "none are set"),
        ("arrow", {"backend": "reference", "top_k": 2}, "plain torch in place of the kernels"),
    ],
)
def test_what_the_method_decides(patched, method, options, reason):
    model, experts = patched
    explained = moerge.patch(model, experts, method, **options).explain()
    assert all(way.way == ways.IN_PLACE and reason in str(way) for way in explained)
