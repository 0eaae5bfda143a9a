"""Bottleneck adapters: whole models against the blocks' equations, and routed beside LoRA and (IA)3."""

import copy
import json

import builders
import pytest
import torch
from patch_cases import batch, error, logits, tokens
from safetensors.torch import load_file, save_file
from torch.nn.functional import relu, silu

import moerge_ext as moerge
from moerge_ext.experts.convert import convert_adapter
from moerge_ext.training.gated_lora import gated_model

LAYER = "model.layers.0.mlp.down_proj"


def with_adapter(model, folder):
    """The model with the adapter in its blocks by hooks of its own: every step written out from the file."""
    model, stored = copy.deepcopy(model), load_file(folder / "adapter.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    f, factor = (relu if config["non_linearity"] == "relu" else silu), config["scaling"]

    def change(start, z):
        part = {key.removeprefix(start + "."): tensor for key, tensor in stored.items() if key.startswith(start + ".")}
        inner = f(z @ part["adapter_down.0.weight"].T + part["adapter_down.0.bias"])
        return factor * (inner @ part["adapter_up.weight"].T + part["adapter_up.bias"])

    def bert(start):
        def forward(self, hidden_states, input_tensor):
            h = self.dense(hidden_states)
            z = self.LayerNorm(h + input_tensor) if config["original_ln_before"] else h
            return self.LayerNorm(h + change(start, z) + input_tensor)

        return forward

    def after_block(start, kept):
        def hook(_module, _args, output):
            h = output[0] if isinstance(output, tuple) else output
            new = h + change(start, h + kept["r"] if config["original_ln_before"] else h)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    for start in sorted({key[: key.index(".adapters.") + len(".adapters.own")] for key in stored}):
        block = start.removesuffix(".adapters.own")
        if model.config.model_type == "bert":
            module = model.get_submodule(block)
            module.forward = bert(start).__get__(module)
            continue
        layer = model.get_submodule(block.rpartition(".")[0])
        attention = block.endswith("attention_adapters")
        names = {"llama": ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")}
        names["gpt2"] = ("attn", "mlp", "ln_1", "ln_2")
        first, second, norm, other = names[model.config.model_type]
        kept = {}
        source = getattr(layer, norm if attention else other)
        source.register_forward_pre_hook(lambda _module, args, kept=kept: kept.update(r=args[0]))
        getattr(layer, first if attention else second).register_forward_hook(after_block(start, kept))
    return model


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("pfeiffer", [True, False])
def test_one_adapter_is_the_model_with_it_in_its_blocks(family, pfeiffer, tmp_path):
    model = getattr(builders, f"tiny_{family}")()
    folder = builders.bottleneck_expert(model, tmp_path / "own", 1, pfeiffer, scaling=0.5)
    inputs = batch(family)
    want, before = logits(with_adapter(model, folder), **inputs), logits(model, **inputs)
    handle = moerge.patch(model, moerge.load_experts(folder), "expert:own")
    assert error(logits(model, **inputs), want) < 1e-5 and error(before, want) > 1e-3
    with handle.disabled():
        assert torch.equal(logits(model, **inputs), before)
    twin = copy.deepcopy(model)
    assert error(logits(twin, **inputs), want) < 1e-5
    handle.remove()
    assert torch.equal(logits(model, **inputs), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def mixed(tmp_path):
    model = builders.tiny_llama()
    folders = {
        "houlsby": builders.bottleneck_expert(model, tmp_path / "houlsby", 1),
        "pfeiffer": builders.bottleneck_expert(model, tmp_path / "pfeiffer", 2, pfeiffer=True),
        "ia3": builders.ia3_expert(model, tmp_path / "ia3", 3),
        **builders.random_experts(model, tmp_path, ("lora",), ("down_proj",)),
    }
    return model, folders, moerge.load_experts(folders, base=model)


@torch.no_grad()
def test_four_kinds_of_experts_share_one_softmax(mixed):
    """The routed layer against the weighted mean of what each expert makes of the same input alone."""
    model, folders, bank = mixed
    seen, alone = {}, {}

    def see(_module, args, output):
        seen["u"], seen["y"] = args[0].clone(), output.clone()

    with moerge.patch(model, bank, "phatgoose", top_k=3) as handle, handle.record(tokens=True) as trace:
        hook = model.get_submodule(LAYER).register_forward_hook(see)
        routed = logits(model, input_ids=tokens())
        hook.remove()
    ((weights, experts),) = trace.calls[LAYER]
    assert weights.shape[1] == 3 and set(experts.flatten().tolist()) == {0, 1, 2, 3}
    u, y = seen["u"], seen["y"]
    residual = {}
    for name in bank.names:  # the same residual and input for each: the layers before and attention as they were routed
        with moerge.patch(model, bank, "phatgoose", top_k=3):
            norm = model.model.layers[0].post_attention_layernorm
            hook = norm.register_forward_pre_hook(lambda _module, args: residual.update(r=args[0].clone()))
            logits(model, input_ids=tokens())
            hook.remove()
        with moerge.patch(model, bank, f"expert:{name}"):
            model.model.layers[0].post_attention_layernorm(residual["r"])  # as the block would call it
            alone[name] = model.get_submodule(LAYER)(u)
    stack = torch.stack([alone[name] for name in bank.names]).flatten(1, 2)  # [E,T,O]
    want = (stack[experts.long(), torch.arange(len(experts))[:, None]] * weights[..., None]).sum(1)
    assert error(y.flatten(0, 1), want) < 1e-5 and routed.isfinite().all()
    model.train()
    with torch.enable_grad(), moerge.patch(model, bank, "phatgoose"):
        model(input_ids=tokens(), labels=tokens()).loss.backward()


def test_what_cannot_be_is_said(mixed, tmp_path):
    model, folders, bank = mixed
    with pytest.raises(ValueError, match="bottleneck adapter.*method 'arrow'"):
        moerge.patch(model, bank, "arrow")
    other = builders.tiny_qwen2()
    with pytest.raises(ValueError, match=r"known in bert, .*model_type 'qwen2'"):
        moerge.patch(other, moerge.load_experts(folders["pfeiffer"], base=other), "given")
    with (
        moerge.patch(model, bank, "expert:pfeiffer"),
        pytest.raises(RuntimeError, match="call the model, not the layer"),
    ):
        model.get_submodule(LAYER)(torch.randn(2, 48))
    config = folders["houlsby"] / "adapter_config.json"
    said = json.loads(config.read_text())
    for fields, words in (
        ({"is_parallel": True}, "reads the block's input"),
        ({"phm_layer": True}, "Kronecker"),
        ({"non_linearity": "other"}, "non_linearity must be one of"),
        ({"original_ln_before": True, "residual_before_ln": "post_add"}, "replaces the block's output"),
        ({"scaling": "odd"}, "scaling must be"),
        ({"novelty": 1}, "unknown field"),
    ):
        config.write_text(json.dumps(said | {"config": said["config"] | fields}))
        with pytest.raises(ValueError, match=words):
            moerge.load_experts(folders["houlsby"], base=model)
    config.write_text(json.dumps(said | {"model_type": "t5"}))
    with pytest.raises(ValueError, match="model_type must be one of bert"):
        moerge.load_experts(folders["houlsby"], base=model)


def test_files(mixed, tmp_path):
    model, folders, bank = mixed
    file = folders["pfeiffer"] / "adapter.safetensors"
    stored = load_file(file)
    first = next(key for key in stored if key.endswith("adapter_up.weight"))
    for tensors, words in (
        ({key: t for key, t in stored.items() if key != first}, "up is missing"),
        (stored | {first: torch.ones(3, 4)}, "down must be"),
        (stored | {"odd": torch.ones(1)}, "no tensor of a bottleneck adapter"),
        (stored | {first: torch.full_like(stored[first], torch.inf)}, "NaN or infinite"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=words):
            moerge.load_experts(folders["pfeiffer"], base=model)
    torch.save(stored, file.with_name("pytorch_adapter.bin"))
    file.unlink()
    with pytest.raises(ValueError, match="is a pickle.*--allow-pickle"):
        moerge.load_experts(folders["pfeiffer"], base=model)
    out = convert_adapter(folders["pfeiffer"], tmp_path / "out", allow_pickle=True)
    again = moerge.load_experts({"pfeiffer": out}, base=model)
    kind = "bottleneck/relu/after_residual"
    mine, theirs = bank.modules[LAYER].branches[kind], again.modules[LAYER].branches[kind]
    assert all(torch.equal(mine.tensors[part][1], tensor[0]) for part, tensor in theirs.tensors.items())
    assert again.get_gates("pfeiffer").keys() == bank.get_gates("pfeiffer").keys()


@torch.no_grad()
@pytest.mark.parametrize("pfeiffer", [True, False])
def test_gates_are_trained(pfeiffer, tmp_path):
    model = builders.tiny_llama()
    folder = builders.bottleneck_expert(model, tmp_path / "own", 1, pfeiffer)
    want = logits(with_adapter(model, folder), input_ids=tokens())
    with gated_model(model, folder, gate=False):
        assert error(logits(model, input_ids=tokens()), want) < 1e-5
    with torch.enable_grad():
        data = [{"input_ids": tokens(), "labels": tokens()}]
        moerge.train_gates(model, folder, data, steps=2, progress=False, overwrite=True)
    bank = moerge.load_experts(folder)
    assert bank.get_gates("own")[LAYER].abs().max() < 1  # no longer the random ones
    moerge.average_activation(model, folder, data, progress=False)
    assert not any(module._forward_pre_hooks for module in model.modules())
