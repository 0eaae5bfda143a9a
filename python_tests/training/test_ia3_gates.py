"""Gates of (IA)3 experts: trained behind a sigmoid, averaged activations, and routed beside those of a LoRA."""

import builders
import pytest
import torch

import moerge_ext as moerge
from moerge_ext.training.gated_lora import gated_model

K, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def folder(tmp_path):
    made = builders.ia3_expert(builders.tiny_llama(), tmp_path / "ia3", seed=1)
    (made / "moerge_gates.safetensors").unlink()
    return made


def data(batches=2):
    ids = torch.randint(3, 96, (batches, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": rows, "labels": rows} for rows in ids]


@torch.no_grad()
def test_the_gated_layers_compute_the_equation(folder):
    model, u = builders.tiny_llama().double(), torch.randn(3, 32).double()
    wide = torch.randn(3, 48).double()
    weights = {path: model.get_submodule(path).weight.clone() for path in (K, DOWN)}
    with gated_model(model, folder) as gated:
        for path, x in ((K, u), (DOWN, wide)):
            layer = gated.layers[path]
            scale = gated.adapter.modules[path].scale.double()
            assert torch.allclose(layer.gate, torch.zeros(x.shape[1]))
            layer.gate.copy_(torch.randn(x.shape[1]))
            g = torch.sigmoid(x @ layer.gate.double())[:, None]
            base = x @ weights[path].T
            alone = base * scale if path == K else (x * scale) @ weights[path].T
            assert torch.allclose(layer(x), base + g * (alone - base), atol=1e-6)
    assert torch.equal(model.get_submodule(K).weight, weights[K])


def test_gates_are_trained_saved_and_routed(folder, tmp_path):
    model = builders.tiny_llama()
    result = moerge.train_gates(model, folder, data(), steps=3, progress=False)
    assert len(result.losses) == 3
    lora = builders.random_experts(model, tmp_path, ("lora",), ("v_proj",))
    bank = moerge.load_experts({"ia3": folder, **lora}, base=model)
    assert bank.get_gates("ia3")[K].abs().sum() > 0
    with moerge.patch(model, bank, "phatgoose"):
        model(input_ids=data()[0]["input_ids"])
    with pytest.raises(ValueError, match="joint=True trains LoRA, and this expert is none"):
        moerge.train_gates(model, folder, data(), joint=True, output_dir=tmp_path / "joint", progress=False)


def test_average_activations(folder):
    model, seen = builders.tiny_llama().eval(), []
    moerge.average_activation(model, folder, data(), progress=False)
    hook = model.get_submodule(K).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    bank = moerge.load_experts(folder, base=model)
    with torch.no_grad(), moerge.patch(model, bank, "expert:ia3"):
        for rows in data():
            model(**rows)
    hook.remove()
    assert torch.allclose(bank.get_gates("ia3", "average-activation")[K], torch.cat(seen).mean(0), atol=1e-5)
