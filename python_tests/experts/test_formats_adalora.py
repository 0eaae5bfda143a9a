"""AdaLoRA folders are read as the LoRA that they are: PEFT's own forward is the check."""

import json
import warnings

import pytest
import torch
from adapter_cases import CONFIG, WEIGHTS, refused
from builders import tiny_llama
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_formats import same_bank

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.convert import convert_adapter
from moerge_ext.routing.patch import patch


def adalora(folder, pruned):
    """A random AdaLoRA folder of PEFT, its ranks pruned as its allocator does at the end of training."""
    torch.manual_seed(0)
    options = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, "lora_alpha": 3}
    config = AdaLoraConfig(target_modules=["q_proj", "down_proj"], **options)
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    if pruned:
        kept = [[True, False, True, False], [True] * 4, [False, False, False, True], [False, True, True, True]]
        names = [name for name, _ in model.model.named_parameters() if "lora_E" in name]
        pattern = dict(zip(names, kept, strict=True))
        model.base_model.resize_modules_by_rank_pattern(pattern, "default")
        model.peft_config["default"].rank_pattern = pattern
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_equals_peft(tmp_path, pruned):
    folder = adalora(tmp_path / "ada", pruned)
    tokens = torch.randint(3, 90, (2, 7))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = PeftModel.from_pretrained(tiny_llama(), folder).eval()(tokens).logits
        bank = load_experts(folder)
        model = tiny_llama()
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-2)
        with patch(model, bank, "expert:ada"):
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        converted = convert_adapter(folder, tmp_path / "plain")
        same_bank(load_experts(converted), bank)
        again = PeftModel.from_pretrained(tiny_llama(), converted).eval()(tokens).logits
        torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    ranks = {rank for module in bank.modules.values() for rank in module.ranks}
    assert ranks == ({1, 2, 3, 4} if pruned else {4})


def test_refused_adalora(tmp_path):
    folder = adalora(tmp_path / "ada", False)
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    for field, value, words in (
        ("init_r", 0, "init_r of an AdaLoRA must be positive"),
        ("init_r", "x", "init_r must be a finite number"),
        ("lora_alpha", 0, "lora_alpha of an AdaLoRA must be positive"),
        ("lora_alpha", None, "lora_alpha must be a finite number"),
        ("use_dora", True, "DoRA"),
    ):
        (folder / CONFIG).write_text(json.dumps(config | {field: value}))
        refused(folder, words)
    (folder / CONFIG).write_text(json.dumps(config))
    key = next(key for key in tensors if key.endswith("lora_E"))
    save_file({name: value for name, value in tensors.items() if name != key}, folder / WEIGHTS)
    refused(folder, "lora_E must be [R, 1]", "got none")
    save_file(tensors | {key[:-1] + "A.weight": torch.ones(4, 32)}, folder / WEIGHTS)
    refused(folder, "'ADALORA' names its factors", "lora_A.weight")
    save_file(tensors | {key: torch.ones(3, 1)}, folder / WEIGHTS)
    refused(folder, "got [3, 1]")


def test_a_module_that_lost_every_rank_is_left_out(tmp_path):
    folder = adalora(tmp_path / "ada", False)
    tensors = load_file(folder / WEIGHTS)
    gone = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors |= {gone + "A": torch.ones(0, 32), gone + "B": torch.ones(32, 0), gone + "E": torch.ones(0, 1)}
    save_file(tensors, folder / WEIGHTS)
    assert "model.layers.0.self_attn.q_proj" not in load_experts(folder).modules
