"""Experts equal PEFT's own view of the same adapters, from folders and from live models."""

import warnings

import pytest
import torch
from builders import random_experts, tiny_gpt2, tiny_llama, tiny_qwen2
from patch_cases import saves_its_own_biases
from peft import LoraConfig, PeftModel, get_peft_model

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats.peft import AdapterError
from moerge_ext.routing.patch import patch

VARIANTS = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "r": 4,
        "rank_pattern": {"k_proj": 2, r"layers.1.*v_proj": 7},
        "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 3, "v_proj": 11},
    },
    "bias": {"r": 3, "lora_bias": True, "target_modules": ["q_proj", "down_proj"]},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian", "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def peft_model():
    """A tiny Llama with five PEFT adapters of random weights."""
    model = None
    for name, fields in VARIANTS.items():
        # lora_bias warns that the base has no bias, which concerns merging alone
        config = LoraConfig(**{"target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = get_peft_model(tiny_llama(), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    torch.manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data.normal_()
    return model


def assert_equals_peft(bank, model):
    checked = 0
    for path, module in bank.modules.items():
        layer = model.get_submodule("base_model.model." + path)
        for e, name in enumerate(bank.names):
            assert bool(module.present[e]) == (name in layer.lora_A)
            if not module.present[e]:
                continue
            delta = layer.get_delta_weight(name)
            torch.testing.assert_close(module.lora_B[e] @ module.lora_A[e], delta, rtol=1e-6, atol=1e-6)
            bias = layer.lora_B[name].bias
            if bias is not None:
                torch.testing.assert_close(module.lora_bias[e], bias * layer.scaling[name], rtol=1e-6, atol=1e-6)
            checked += 1
    assert checked == 3 * 6 + 4 + 3


def test_folders_equal_peft(peft_model, tmp_path):
    if not saves_its_own_biases():
        pytest.skip("needs a newer PEFT: this one saves the biases of every adapter with each")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes lora_B.bias for a broken matrix
        peft_model.save_pretrained(tmp_path)
    bank = load_experts({name: tmp_path / name for name in VARIANTS})
    assert_equals_peft(bank, peft_model)


def test_live_model_equals_peft(peft_model):
    before = {key: value.clone() for key, value in peft_model.state_dict().items()}
    bank = load_experts(peft_model)
    assert bank.names == tuple(VARIANTS) and bank.folders == (None,) * 5
    assert_equals_peft(bank, peft_model)
    bank.modules["model.layers.0.self_attn.q_proj"].lora_A.zero_()
    after = peft_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_live_model_refusals():
    config = {"r": 2, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny_llama(), LoraConfig(**config), adapter_name="good")
    model.add_adapter("dora", LoraConfig(**config, use_dora=True))
    model.add_adapter("moves", LoraConfig(**config, init_lora_weights="pissa"))
    with pytest.raises(AdapterError) as caught:
        load_experts(model)
    assert "2 of 3" in str(caught.value) and "DoRA" in str(caught.value) and "'moves'" in str(caught.value)
    assert "save the adapter and pass its folder" in str(caught.value)
    merged = get_peft_model(tiny_llama(), LoraConfig(**config))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        load_experts(merged)
    embedding = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match="embed_tokens: LoRA on an embedding"):
        load_experts(embedding)


@pytest.mark.parametrize("bias, trained", [("none", 0), ("lora_only", 2), ("all", 6)])
def test_trained_biases_of_a_live_model(bias, trained):
    config = LoraConfig(r=2, target_modules=["q_proj"], bias=bias)
    assert len(load_experts(get_peft_model(tiny_llama(), config)).modules) == 2  # which has no biases
    model = get_peft_model(tiny_qwen2(), config)
    if not trained:
        assert len(load_experts(model).modules) == 2
        return
    with pytest.raises(AdapterError, match="trained biases of the base.*q_proj") as caught:
        load_experts(model)
    assert ("and 3 more" in str(caught.value)) == (trained == 6)


def test_configs_of_a_live_model_that_change_nothing():
    fields = {"auto_mapping": {"base_model_class": "Net", "unsloth_fixed": True}, "ensure_weight_tying": True}
    patterns = {
        "rank_pattern": {"(?!x).*q_proj": 3},
        "alpha_pattern": {"(?i:Q_PROJ)": 5},
    }  # the layer holds its scaling
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"], **fields, **patterns)
    bank = load_experts(get_peft_model(tiny_llama(), config))
    assert bank.modules["model.layers.0.self_attn.q_proj"].ranks == (3,) and not bank.claims["default"].saved


def test_transformers_model_with_adapters():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="one")
    bank = load_experts(model)
    assert bank.names == ("one",) and "model.layers.0.self_attn.q_proj" in bank.modules


def test_conv1d_base_equals_peft(tmp_path):
    model = tiny_gpt2()
    folders = random_experts(model, tmp_path, ["a"], ["c_attn", "c_fc", "c_proj"])
    bank = load_experts(folders)
    peft = PeftModel.from_pretrained(model, str(folders["a"]), adapter_name="a")
    for path, module in bank.modules.items():
        layer = peft.get_submodule("base_model.model." + path)
        delta = layer.lora_B["a"].weight @ layer.lora_A["a"].weight * layer.scaling["a"]
        torch.testing.assert_close(module.lora_B[0] @ module.lora_A[0], delta, rtol=1e-6, atol=1e-6)
    assert bank.modules["transformer.h.0.attn.c_attn"].out_features == 96


def test_patch_says_what_to_pass_instead(peft_model):
    with pytest.raises(ValueError) as caught:
        patch(peft_model, load_experts(peft_model), "arrow")
    _, said = str(caught.value).splitlines()
    assert "PEFT's PeftModelForCausalLM" in said and "pass model.unload()" in said


def test_the_model_inside_can_be_patched():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    experts = load_experts(model)
    assert len(patch(model.unload(), experts, "expert:default").modules) == 2
