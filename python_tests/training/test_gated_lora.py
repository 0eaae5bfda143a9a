"""The layer that gates are trained in, and putting it into a model and taking it out again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gate_builders import (
    Untouched,
    batches,
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from safetensors.torch import load_file
from torch import nn

from moerge_ext.experts.formats.peft import LoraWeights, read_adapter, read_gates
from moerge_ext.training.gated_lora import GatedLoRA, gated_model
from moerge_ext.training.gates import train_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(llama(), tmp_path / "expert")


def random_layer(dtype=torch.float64, bias=True, d=5, o=4, r=3, **options):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    base = nn.Linear(d, o, dtype=torch.float64)
    lora = LoraWeights(draw(r, d).to(dtype), draw(o, r).to(dtype), 0.7, draw(o).to(dtype) if bias else None)
    return GatedLoRA(base, lora, **options), draw


def test_gradient_is_the_formula():
    layer, draw = random_layer()
    gate = draw(5)
    layer.gate = nn.Parameter(gate.clone())
    u, dy = draw(2, 6, 5), draw(2, 6, 4)
    layer(u).backward(dy)
    strength = torch.sigmoid(u @ gate)
    expert = 0.7 * (u @ layer.lora_A.T @ layer.lora_B.T + layer.lora_bias)
    slope = (dy * expert).sum(-1) * strength * (1 - strength)
    torch.testing.assert_close(layer.gate.grad, (slope[..., None] * u).sum((0, 1)))
    torch.testing.assert_close(layer(u), layer.base_layer(u) + expert * strength[..., None])
    assert not layer.lora_A.requires_grad


def test_gradcheck_of_everything_trained():
    layer, draw = random_layer(train_lora=True)
    layer.gate = nn.Parameter(draw(5))
    u = draw(3, 5).requires_grad_()
    names = list(layer.trainable())
    assert names == ["lora_A", "lora_B", "lora_bias", "gate"]

    def run(u, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (u,))

    assert torch.autograd.gradcheck(run, (u, *layer.trainable().values()))


def test_conformance_with_phatgoose(shared):
    data = load_file(shared / "conformance" / "phatgoose_layer.safetensors")
    base = nn.Linear(64, 48, bias=False)
    base.weight.data = data["W"]
    lora = LoraWeights(data["layer1"][0].T.contiguous(), data["layer2"][0].T.contiguous(), 1 / 16, None)
    layer = GatedLoRA(base, lora)
    layer.gate.data = data["gate_train_gate"]
    with torch.no_grad():
        got, expected = layer(data["x"]), data["gate_train_out"]
    assert (got - expected).norm() / expected.norm() <= 1e-5
    assert (got - base(data["x"])).norm() > 0.01 * expected.norm()


def test_zero_gate_is_half_the_lora():
    half, draw = random_layer(dtype=torch.float32)
    whole = GatedLoRA(half.base_layer, LoraWeights(half.lora_A, half.lora_B, 0.7, half.lora_bias), gate=False)
    u = draw(7, 5)
    base = half.base_layer(u)
    torch.testing.assert_close(half(u) - base, (whole(u) - base) / 2)
    assert half.gate.dtype == torch.float32 and half.in_features == 5 and half.weight is half.base_layer.weight


def test_no_token_is_nothing_to_learn_from():
    """As for an expert of a mixture that no token went to."""
    layer, draw = random_layer()
    layer(draw(0, 5)).sum().backward()
    assert layer.gate.grad is None and not layer.ran
    layer(draw(1, 5)).sum().backward()
    assert layer.gate.grad is not None and layer.ran


def test_bfloat16_base_and_autocast():
    layer, draw = random_layer(dtype=torch.bfloat16, bias=False)
    layer.base_layer.to(torch.bfloat16)
    u = draw(9, 5).to(torch.bfloat16)
    out = layer(u)
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(u), out, rtol=0, atol=0)
    out.float().sum().backward()
    assert layer.gate.grad.dtype == torch.float32 and layer.gate.grad.abs().sum() > 0


def test_an_exception_restores_the_model(adapter):
    model = llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].train()
    model.gradient_checkpointing_enable()
    untouched = Untouched(model)
    with pytest.raises(KeyError), gated_model(model, adapter) as gated:
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{path}.gate" for path in gated.layers}
        model.train()
        model(**batches()[0]).loss.backward()
        raise KeyError
    untouched.check()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, adapter):
    def trained(model):
        train_gates(model, adapter, batches(), **quiet(steps=2))
        return read_gates(adapter)["sigmoid-gate"].gates

    plain, model = trained(llama()), llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()  # some versions of transformers turn it on here, some do not
    untouched = Untouched(model)
    checkpointed = trained(model)
    untouched.check()
    for path, gate in plain.items():
        torch.testing.assert_close(checkpointed[path], gate)


def test_refuses_an_adapter_that_does_not_fit_with_all_reasons(adapter):
    model = llama()
    layer = model.model.layers[0]
    layer.mlp.up_proj = nn.Linear(16, 25)
    layer.self_attn.q_proj = nn.Identity()
    del layer.mlp.gate_proj
    untouched = Untouched(model)
    with pytest.raises(ValueError) as caught, gated_model(model, adapter):
        pass
    text = str(caught.value)
    assert "layers.0.mlp.gate_proj: the model has no such module" in text
    assert "layers.0.self_attn.q_proj: Identity is not a linear layer" in text
    assert "layers.0.mlp.up_proj" in text and "[24, 16]" in text and "[25, 16]" in text
    untouched.check()
    model = llama()
    with (
        gated_model(model, adapter),
        pytest.raises(ValueError, match="already wrapped by GatedLoRA"),
        gated_model(model, adapter),
    ):
        pass


def test_the_layer_computes_where_accelerate_says():
    layer, _ = random_layer()
    lora = LoraWeights(layer.lora_A, layer.lora_B, 0.7, None)
    nowhere, there = SimpleNamespace(execution_device=None), SimpleNamespace(execution_device="meta")
    for hook in (there, SimpleNamespace(hooks=(nowhere, there))):
        layer.base_layer._hf_hook = hook
        assert GatedLoRA(layer.base_layer, lora).gate.device.type == "meta"
    layer.base_layer._hf_hook = SimpleNamespace(hooks=(nowhere,))
    assert GatedLoRA(layer.base_layer, lora).gate.device.type == "cpu"


def test_refuses_a_model_that_was_not_loaded(adapter):
    with (
        pytest.raises(ValueError, match="down_proj, .*: its weights are on the meta device"),
        gated_model(llama().to("meta"), adapter),
    ):
        pass


def test_layers_of_every_kind():
    from transformers.pytorch_utils import Conv1D

    from moerge_ext.routing import layers

    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(Conv1D(7, 5), nn.Identity()))
    features = [layers.linear_features(model.get_submodule(path)) for path in ("0", "1.0", "1.1")]
    assert features == [(3, 5), (5, 7), None]
    new = nn.Linear(5, 7)
    layers.replace_module(model, "1.0", new)
    assert model[1][0] is new
    assert layers.execution_device(nn.Identity()) == torch.device("cpu")
    assert layers.execution_device(nn.Linear(2, 2, device="meta")) == torch.device("meta")


def test_joint_training_leaves_what_was_read(adapter):
    model = llama()
    with gated_model(model, adapter, joint=True) as gated, torch.no_grad():
        for p in gated.parameters().values():
            p.add_(1)
        for path, lora in read_adapter("again", adapter).modules.items():
            assert torch.equal(gated.adapter.modules[path].lora_A, lora.lora_A)
        with pytest.raises(ValueError, match="another model; in one of the two only: .*q_proj/lora_A"):
            gated.restore({name: v for name, v in gated.snapshot().items() if "q_proj/lora_A" not in name})
