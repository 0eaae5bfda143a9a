"""Biases of the base that an adapter was trained with, in the layers of its own LoRA (PEFT's `bias`)."""

import copy

import peft
import pytest
import torch
from builders import tiny_gpt2, tiny_qwen2
from patch_cases import error
from safetensors.torch import load_file

import moerge_ext as moerge
from moerge_ext.routing.patch import check_patch

IDS = torch.arange(3, 20)[None]


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


@pytest.fixture(params=("lora_only", "all"))
def bias(request):
    return request.param


@pytest.mark.parametrize("make, layer", [(tiny_gpt2, "attn.c_attn"), (tiny_qwen2, "self_attn.q_proj")])
def test_only_what_helps_is_advised(make, layer, bias, tmp_path):
    """No method takes them, and `modules=` takes neither without the other: they go into the model first."""
    model, target = make(), layer.partition(".")[2]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=3, target_modules=[target], bias=bias))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "e")
    bank = moerge.load_experts([tmp_path / "e"])
    alone = moerge.load_experts([tmp_path / "e"], modules=target)
    for method, said in (("merged", bank), ("expert:e", bank), ("merged", alone)):
        for check in (moerge.patch, check_patch):
            with pytest.raises(ValueError) as caught:
                check(model, said, method)
            words = str(caught.value)
            assert f"1.{layer}.bias, of a layer that carries its LoRA as well: load such parameters into" in words
            assert "leave these layers out" in words and "With them: method" not in words, words
    with pytest.raises(ValueError, match="to compare them, or leave these layers out"):
        moerge.merge_experts(bank, tmp_path / "merged")
    for name, tensor in load_file(tmp_path / "e" / "adapter_model.safetensors").items():
        if "lora_" not in name:
            path = name.removeprefix("base_model.model.").replace("base_layer.", "")
            model.get_parameter(path).data.copy_(tensor)
    with moerge.patch(model, bank, "merged"):
        assert error(logits(model), logits(theirs)) < 1e-5
