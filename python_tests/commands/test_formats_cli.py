"""`moerge convert`, and base models and experts in files of llama.cpp."""

import sys

import pytest
import torch
from builders import linear_sizes, tiny_llama, write_adapter
from format_cases import gguf_bytes, gguf_name, pairs_from_halves, write_gguf, write_mlx
from safetensors.torch import load_file

from moerge_ext.commands import main as cli
from moerge_ext.experts.bank import load_experts
from moerge_ext.models.pretrained import load_model, load_tokenizer
from moerge_ext.routing.patch import patch


def modules_of(model):
    random = torch.Generator().manual_seed(0)
    return {
        path: (torch.randn(4, d, generator=random) / 4, torch.randn(o, 4, generator=random) / 4)
        for path, d, o in linear_sizes(model, ["q_proj", "k_proj", "up_proj"])
    }


def test_convert(tmp_path, capsys):
    model = tiny_llama()
    modules = modules_of(model)
    write_mlx(tmp_path / "mlx", modules, 2.0)
    write_gguf(tmp_path / "a.gguf", modules, "llama", heads=(4, 2))
    model.config.save_pretrained(tmp_path / "base")
    out = [tmp_path / "one", tmp_path / "two"]
    assert cli.main(["convert", str(tmp_path / "mlx"), str(out[0])]) == 0
    assert cli.main(["convert", str(tmp_path / "a.gguf"), str(out[1]), "--base", str(tmp_path / "base")]) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in out]
    written = [load_file(path / "adapter_model.safetensors") for path in out]
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][key], written[1][key]) for key in written[0])


def test_convert_says_what_is_wrong(tmp_path, capsys):
    write_gguf(tmp_path / "a.gguf", modules_of(tiny_llama()), "llama", heads=(4, 2))
    assert cli.main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 2
    assert "of the command: --model" in capsys.readouterr().err
    write_adapter(tmp_path / "peft", {"q": (torch.ones(4, 8), torch.ones(6, 4))})
    assert cli.main(["convert", str(tmp_path / "peft"), str(tmp_path / "peft")]) == 2
    assert "is there already" in capsys.readouterr().err


def write_model(path):
    """A tiny Llama as llama.cpp stores it, with a tokenizer of letters; returns the model."""
    model = tiny_llama()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {}
    for key, value in model.state_dict().items():
        module = key.removesuffix(".weight")
        layer, _, last = module.removeprefix("model.layers.").partition(".")
        name = names.get(module) or (f"blk.{layer}.{norms[last]}" if last in norms else gguf_name(module))
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(last)
        tensors[f"{name}.weight"] = pairs_from_halves(value, heads) if heads else value
    sizes = {
        "context_length": 128,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "vocab_size": 96,
        "attention.layer_norm_rms_epsilon": model.config.rms_norm_eps,
        "rope.freq_base": 10000.0,
    }
    values = {"general.architecture": "llama", "general.type": "model"}
    values |= {f"llama.{key}": value for key, value in sizes.items()}
    words = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(97, 123)), *(f"t{i}" for i in range(65)), "▁"]
    values |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0] * 96,
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [1] * 92,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
    }
    path.write_bytes(gguf_bytes(tensors, values))
    return model


def test_a_model_and_an_expert_of_llama_cpp(tmp_path, capsys):
    """transformers puts the base's rows back, we the expert's: together they are the Llama with its PEFT folder."""
    pytest.importorskip("gguf")
    file = tmp_path / "base.gguf"
    model = write_model(file)
    modules = modules_of(model)
    experts = [write_gguf(tmp_path / f"{name}.gguf", modules, "llama", heads=(4, 2)) for name in "ab"]
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    loaded = load_model(str(file), dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        patch(loaded, load_experts(experts[0], base=str(file)), "expert:a")
        patch(model, load_experts(write_adapter(tmp_path / "peft", modules)), "expert:peft")
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert load_tokenizer(str(file))("abc").input_ids[-3:] == [4, 5, 6]
    command = ["generate", "abc", "--model", str(file), "--method", "arrow", "--top-k", "1", "--max-new-tokens", "4"]
    assert cli.main([*command, "--experts", *map(str, experts)]) == 0
    assert capsys.readouterr().out.strip()


def test_what_is_no_model(tmp_path, capsys, monkeypatch):
    expert = str(write_gguf(tmp_path / "a.gguf", modules_of(tiny_llama())))
    (tmp_path / "config.json").write_text("{}")

    def said(path):
        assert cli.main(["generate", "abc", "--model", str(path), "--method", "arrow", "--experts", expert]) == 2
        return capsys.readouterr().err

    assert "is an adapter, not a model" in said(expert)
    assert "is a file: pass the folder of a model, a .gguf file" in said(tmp_path / "config.json")
    (tmp_path / "b.gguf").write_bytes(gguf_bytes({}, {"general.architecture": "llama"}))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'moerge_ext[gguf]'" in said(tmp_path / "b.gguf")
