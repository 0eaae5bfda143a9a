"""The short way of RoutedLinear.forward, taken without gradient, trace and hooks: it says what the long one says."""

from __future__ import annotations

import pytest
import torch
from patch_cases import bank, build, error
from torch import nn

import moerge_ext as moerge
from moerge_ext import ops
from moerge_ext.routing.routed_linear import RoutedLinear


@pytest.fixture
def layer(tmp_path):
    model = build("llama")
    moerge.patch(model, bank("llama", model, tmp_path), "phatgoose")
    return next(m for m in model.modules() if isinstance(m, RoutedLinear))


@pytest.fixture
def short(monkeypatch):
    """The list that every call of the short way is added to."""
    calls = []

    def counted(*args, op=ops.ROUTED_LORA_):
        calls.append(args)
        return op(*args)

    monkeypatch.setattr(ops, "ROUTED_LORA_", counted)
    return calls


def long_way(layer: RoutedLinear, x: torch.Tensor) -> torch.Tensor:
    hook = layer.base_layer.register_forward_hook(lambda *unused: None)
    try:
        return layer(x)
    finally:
        hook.remove()


def grow(layer):
    layer.lora_B.mul_(2)


def replace_attribute(layer):
    layer.lora_B = 3 * layer.lora_B


def replace_buffer(layer):
    layer._buffers["lora_A"] = -layer.lora_A


def replace_bias(layer):
    bias = torch.randn(layer.lora_A.shape[0], layer.out_features)
    layer.register_buffer("lora_bias", bias, persistent=False)


def replace_base(layer):
    layer.base_layer = nn.Linear(layer.in_features, layer.out_features)


def reroute(layer):
    layer.route_options["top_k"] = 1


def factor(layer):
    layer.factored = True


def convert(layer):
    layer.double()


@pytest.mark.parametrize(
    "change",
    [grow, replace_attribute, replace_buffer, replace_bias, replace_base, reroute, factor, convert],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_a_change_is_seen(short, layer, change):
    x = torch.randn(3, 5, layer.in_features)
    before = layer(x)
    change(layer)
    x = x.to(layer.weight.dtype)
    after = layer(x)
    assert len(short) == 2
    assert error(after, long_way(layer, x)) < 1e-6
    assert len(short) == 2
    assert after.dtype != before.dtype or error(after, before) > 1e-4


@torch.no_grad()
def test_where_it_is_not_taken(short, layer, monkeypatch):
    x = torch.randn(3, 5, layer.in_features)
    expected = layer(x)
    assert len(short) == 1
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", lambda self, x: seen.append(x) or nn.functional.linear(x, self.weight))
        layer(x)
    hook = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call[-1]))
    layer(x)
    hook.remove()
    assert seen and error(layer(x.transpose(0, 1).contiguous().transpose(0, 1)), expected) < 1e-6
    base = layer.base_layer
    weight = base._parameters.pop("weight")
    base.weight = weight.detach()  # a plain attribute, as some quantizers leave it
    assert error(layer(x), expected) < 1e-6
    del base.weight
    base.weight = weight
    with torch.enable_grad():
        assert layer(x.requires_grad_()).requires_grad
    assert len(short) == 1


@torch.no_grad()
def test_one_vector_is_one_token(short, layer):
    x = torch.randn(layer.in_features)
    assert error(layer(x), layer(x[None])[0]) < 1e-6 and layer(x).shape == (layer.out_features,)
    assert error(long_way(layer, x), layer(x)) < 1e-6 and len(short) >= 2


@torch.no_grad()
def test_its_errors_are_those_of_the_op(short, layer):
    layer.lora_A = layer.lora_A[:-1]
    with pytest.raises(ValueError, match=r"moerge::routed_lora_: lora_b must be \[E="):
        layer(torch.randn(2, layer.in_features))


@torch.no_grad()
def test_global_affinities_take_it_too(short, tmp_path):
    model = build("llama")
    experts = bank("llama", model, tmp_path)
    handle = moerge.patch(model, experts, "glider_code", alpha=1000)
    layer = next(m for m in model.modules() if isinstance(m, RoutedLinear))
    x, seen = torch.randn(2, 5, layer.in_features), []
    for scores in (torch.eye(len(experts))[:2], torch.eye(len(experts))[1:3], torch.eye(len(experts))[0]):
        with handle.affinities(scores):
            seen.append(layer(x))
            assert len(short) == len(seen)
            assert error(seen[-1], long_way(layer, x)) < 1e-6
    assert error(seen[0], seen[1]) > 1e-4 and error(seen[1], seen[2]) > 1e-4
    with pytest.raises(RuntimeError, match="takes a number per expert of each sequence, and none is set"):
        layer(x)
    assert len(short) == len(seen)
