"""Training on a quantized base: gradients pass its layers, or it is refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from gate_builders import batches, quiet

from moerge_ext.training.experts import train_expert
from moerge_ext.training.quantized import passing_gradients

NEEDS = "pip install 'moerge_ext[quantized]'"
bitsandbytes = pytest.importorskip("bitsandbytes", reason=NEEDS)


def llama_config():
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 96, "num_hidden_layers": 2}
    return transformers.LlamaConfig(num_attention_heads=4, initializer_range=0.2, **sizes)


def quantized(folder, **options):
    transformers.LlamaForCausalLM(llama_config()).save_pretrained(folder)
    held = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=held, device_map="cpu")
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("no weight is packed on this CPU: it has no AVX-512 BF16")
    return model.eval()


@pytest.mark.parametrize("twice", [False, True])
def test_a_loss_measured_on_the_way_changes_no_step(twice, tmp_path):
    """The first run packs nothing; in the others a packed base would let no gradient through."""
    data, options = batches(), quiet(steps=6, lr=0.01, alpha=16)
    model = quantized(tmp_path, bnb_4bit_use_double_quant=twice)
    want = train_expert(model, data, tmp_path / "alone", **options).losses
    measured = train_expert(model, data, tmp_path / "measured", validation=data, eval_every=1, **options)
    assert measured.losses == want
    model.generate(torch.arange(3, 9)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu
    after = train_expert(model, data, tmp_path / "after", **options).losses
    assert after == pytest.approx(want, abs=0.1)  # packing rounds the scales of the blocks to bfloat16


def test_layers_pack_again_afterwards(tmp_path):
    model = quantized(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(KeyError), passing_gradients(model):
        layer(torch.ones(1, 128))
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        raise KeyError
    with torch.no_grad():
        layer(torch.ones(1, 128))
    assert layer.weight.quant_state.packing_format_for_cpu


def test_a_layer_that_keeps_gradients_back_is_refused(tmp_path):
    """torchao's int8 activations have no gradient; of its weights alone there is one."""
    ways = pytest.importorskip("torchao.quantization", reason=NEEDS)
    for name, passes in (("Int8DynamicActivationInt8WeightConfig", False), ("Int8WeightOnlyConfig", True)):
        model = transformers.LlamaForCausalLM(llama_config()).eval()
        ways.quantize_(model.model, getattr(ways, name)())
        if passes:
            train_expert(model, batches(), tmp_path / name, **quiet(steps=1))
            continue
        with pytest.raises(ValueError, match="layers.0.*lets no gradient pass.*without this quantization"):
            train_expert(model, batches(), tmp_path / name, **quiet(steps=1))
        assert not any(tmp_path.glob(f"{name}/*.safetensors"))
