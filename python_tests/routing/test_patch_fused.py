"""On a GPU a patched plain linear computes base and branch in one op. Here the CPU stands in for it."""

from __future__ import annotations

import guard_cases
import pytest
import torch
from patch_cases import bank, build, error, logits, tokens
from torch import nn

import moerge_ext as moerge
from moerge_ext import ops
from moerge_ext.experts.module_bank import whole_vectors
from moerge_ext.methods.base import Plan, Routing
from moerge_ext.routing import ways
from moerge_ext.routing.routed_linear import RoutedLinear, laid_out

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """Makes layers on the CPU fuse, and returns the list that every fused call is added to."""
    made = []

    def counted(*args, op=ops.ROUTED_LINEAR_Y):
        made.append(args[0].shape)
        return op(*args)

    monkeypatch.setattr(ways, "FUSED_DEVICES", {"cpu"})
    monkeypatch.setattr(ops, "ROUTED_LINEAR_Y", counted)
    return made


@pytest.fixture
def layer(tmp_path):
    model = build("llama")
    moerge.patch(model, bank("llama", model, tmp_path), "phatgoose")
    return next(m for m in model.modules() if isinstance(m, RoutedLinear))


@torch.no_grad()
def test_a_model_says_the_same(calls, tmp_path):
    model = build("llama")
    handle = moerge.patch(model, bank("llama", model, tmp_path), "phatgoose")
    ids = tokens(2, 4)
    got = logits(model, input_ids=ids)
    layers = sum(isinstance(m, RoutedLinear) for m in model.modules())
    assert len(calls) == layers > 0 and set(calls) == {(2, 4, calls[0][-1]), (2, 4, calls[-1][-1])}
    with handle.record():
        recorded = logits(model, input_ids=ids)
    assert len(calls) == layers
    assert error(got, recorded) < 1e-5


@torch.no_grad()
def test_what_does_not_fuse(calls, layer):
    base, x = layer.base_layer, torch.randn(2, 4, layer.in_features)
    with torch.enable_grad():
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    layer(x.transpose(0, 1))
    for register in (base.register_forward_hook, base.register_forward_pre_hook):
        hook = register(lambda *unused: None)
        layer(x)
        hook.remove()
    base.forward = base.forward
    layer(x)
    del base.forward
    plain, layer.base_layer = base, nn.Sequential(base)
    layer.base_layer.weight = None
    layer(x)
    layer.base_layer = plain
    layer.backend = "reference"
    layer(x)
    layer.backend = "native"
    assert not calls
    layer(x)
    assert len(calls) == 1


class Graphs(list):
    """A backend of torch.compile that keeps the ops of every graph."""

    def __call__(self, module, inputs):
        self.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module


@pytest.fixture
def graphs(monkeypatch):
    """Makes layers on the CPU fuse, and is the backend to compile them with."""
    monkeypatch.setattr(ways, "FUSED_DEVICES", {"cpu"})
    torch._dynamo.reset()
    return Graphs()


@torch.no_grad()
def test_a_compiled_layer_fuses(graphs, layer):
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for length in (1, 2, 3, 7, 20, 33):
        x = torch.randn(2, length, layer.in_features)
        assert torch.equal(compiled(x), layer(x))
    assert len(graphs) <= 2  # one length, then any
    assert all(ops.ROUTED_LINEAR_Y in graph and nn.functional.linear not in graph for graph in graphs)
    layer.route_options["top_k"] = 1
    assert torch.equal(compiled(x), layer(x)) and len(graphs) <= 3
    assert torch.equal(compiled(x[0, 0]), layer(x[0, 0])) and len(graphs) <= 4


@torch.no_grad()
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_compiled_layer_fuses_few_tokens_on_a_cpu(graphs, dtype, monkeypatch):
    monkeypatch.setattr(ways, "FUSED_DEVICES", {"cuda"})
    model = nn.Sequential(nn.Linear(256, 256)).to(dtype)
    moerge.patch(model, guard_cases.experts(model, ["0"]), "arrow", top_k=2)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for count in (1, 2, 3, 7, 16, 17, 33, 40, 5):
        before, x = len(graphs), torch.randn(count, 256).to(dtype)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
        assert all((ops.ROUTED_LINEAR_Y in graph) == (count <= 16) for graph in graphs[before:])
    assert len(graphs) <= 4  # one token, another number, few, many
    torch._dynamo.reset()
    x = torch.randn(7, 256).to(dtype)
    torch._dynamo.mark_dynamic(x, 0)
    torch.testing.assert_close(torch.compile(model, backend=graphs, fullgraph=True)(x), model(x))


@torch.no_grad()
def test_what_does_not_fuse_when_compiled(graphs, layer):
    base, x = layer.base_layer, torch.randn(2, 4, layer.in_features)

    def compiled():
        torch._dynamo.reset()
        y = torch.compile(layer, backend=graphs, fullgraph=True)(x)
        assert error(y, layer(x)) < 1e-6 and ops.ROUTED_LINEAR_Y not in graphs[-1]
        return y

    for register, change in (
        (base.register_forward_hook, lambda module, inputs, y: 2 * y),
        (base.register_forward_pre_hook, lambda module, inputs: (2 * inputs[0],)),
    ):
        hook = register(change)
        compiled()
        hook.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled()
    with torch.enable_grad():
        assert compiled().requires_grad
    x = x.transpose(0, 1)
    compiled()
    layer.base_layer = nn.Sequential(base)
    compiled()
    assert len(graphs) == 6


@torch.no_grad()
def test_a_compiled_model_sees_the_handle(graphs, tmp_path):
    model, ids = build("llama"), tokens(2, 4)
    plain = logits(model, input_ids=ids)
    handle = moerge.patch(model, bank("llama", model, tmp_path), "phatgoose")
    routed = logits(model, input_ids=ids)
    compiled = torch.compile(model, backend=graphs)
    assert error(compiled(input_ids=ids).logits, routed) < 1e-6
    fused = sum(graph.count(ops.ROUTED_LINEAR_Y) for graph in graphs)
    assert fused == len(handle.modules)
    with handle.disabled():
        assert torch.equal(compiled(input_ids=ids).logits, plain)
    with handle.record() as trace:
        assert error(compiled(input_ids=ids).logits, routed) < 1e-6
    assert trace.share().sum() > 0.99
    handle.remove()
    assert torch.equal(compiled(input_ids=ids).logits, plain)
    assert sum(graph.count(ops.ROUTED_LINEAR_Y) for graph in graphs) == fused


@pytest.mark.parametrize("experts", [8, 9])
def test_gates_lie_as_the_device_reads_them(layer, experts):
    """On the CPU many experts side by side, few one after the other; elsewhere one after the other."""
    gates = torch.randn(experts, layer.in_features)
    layer.gates = gates
    layer.to(torch.float64)  # lays them out
    assert torch.equal(layer.gates, gates)
    assert layer.gates.stride() == ((1, experts) if experts > 8 else (layer.in_features, 1))
    moved = layer.to("meta")
    assert moved.gates.is_contiguous() and moved.gates.shape == gates.shape


@pytest.mark.parametrize("experts", [8, 9])
def test_a_copy_of_gates_is_a_copy(experts):
    gates = torch.randn(experts, 16)
    copied = laid_out(gates, gates.device, copy=True)
    assert torch.equal(copied, gates) and copied.data_ptr() != gates.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("rank", [3, 8, 20])
def test_ranks_come_in_vectors_away_from_the_cpu(rank):
    plan = Plan(
        lora_A=torch.randn(5, 16, rank).mT, lora_B=torch.randn(5, rank, 24).mT, lora_bias=None, gates=torch.randn(5, 16)
    )
    layer = RoutedLinear(nn.Linear(16, 24), plan, Routing(), name="layer")
    assert layer.lora_A.shape == (5, rank, 16)
    x = torch.randn(7, 16)
    want = layer(x)
    layer.lora_A, layer.lora_B = whole_vectors(layer.lora_A, layer.lora_B)
    torch.testing.assert_close(layer(x), want)
    moved = RoutedLinear(nn.Linear(16, 24), plan, Routing(), name="layer").to("meta")
    wide = (rank + 7) // 8 * 8
    assert moved.lora_A.shape == layer.lora_A.shape == (5, wide, 16) and moved.lora_B.shape == (5, 24, wide)
    for a, b in ((layer.lora_A, layer.lora_B), (moved.lora_A, moved.lora_B)):
        assert a.mT.is_contiguous() and b.mT.is_contiguous()


@pytest.mark.parametrize("bank, base, slow", [(F32, BF16, True), (BF16, BF16, False), (BF16, F32, True)], ids=str)
def test_a_mix_of_types_is_slow_away_from_the_cpu_and_says_so(bank, base, slow, recwarn):
    plan = Plan(torch.zeros(2, 8, 16, dtype=bank), torch.zeros(2, 24, 8, dtype=bank), None, gates=torch.zeros(2, 16))
    layer = RoutedLinear(nn.Linear(16, 24, dtype=base), plan, Routing(), name="layer")
    assert not recwarn.list
    layer.to("meta")
    RoutedLinear(nn.Linear(16, 24, dtype=base, device="meta"), plan, Routing(), name="layer")
    said = [str(warning.message) for warning in recwarn.list]
    assert len(said) == 2 * slow and all(f"load_experts(..., dtype={base})" in text for text in said)
    layer.to("meta", BF16)
    assert len(recwarn.list) == len(said)
