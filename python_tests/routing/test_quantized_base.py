"""Experts on a base that a quantizer holds, against PEFT with the same adapter on the same base."""

from __future__ import annotations

import builders
import patch_cases as cases
import pytest
import torch
import transformers
from patch_cases import error

import moerge_ext as moerge

peft = pytest.importorskip("peft")
NEEDS = "pip install 'moerge_ext[quantized]'"
IDS = torch.arange(2, 20).view(2, 9)


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes", reason=NEEDS)
    return transformers.BitsAndBytesConfig(**options)


def torchao(name: str):
    return transformers.TorchAoConfig(getattr(pytest.importorskip("torchao.quantization", reason=NEEDS), name)())


KINDS = {
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
}


def wide_enough() -> torch.nn.Module:
    """For the quantizers' blocks of 64."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=4, **sizes)).eval()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:patch. the experts were trained on another model")
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_computes_as_with_peft(kind, tmp_path):
    config = KINDS[kind]()
    plain = wide_enough()
    made = builders.random_experts(plain, tmp_path, ("ant", "bee"), cases.FAMILIES["llama"][1], gates=False)
    folders = [made["ant"], made["bee"]]
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "base")

    def load():
        options = {"dtype": torch.bfloat16, "quantization_config": config, "device_map": "cpu"}
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options).eval()

    model = load()
    before = model(IDS).logits
    want = peft.PeftModel.from_pretrained(load(), folders[0]).eval()(IDS).logits
    with moerge.patch(model, moerge.load_experts(folders), "expert:ant"):
        got = model(IDS).logits
    assert (
        error(got.float() - before.float(), want.float() - before.float()) < 0.1
    )  # over bitsandbytes PEFT rounds a branch by itself
    assert error(want.float(), before.float()) > 0.3  # there is something to compare
    assert torch.equal(model(IDS).logits, before)
