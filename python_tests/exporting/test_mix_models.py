"""Branch-Train-Mix: a mixture against an independent computation, and what cannot be mixed."""

from __future__ import annotations

import copy
import json

import builders
import pytest
import torch
import transformers
from builders import _DECODER, make_tokenizer
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.exporting import mix as mix_module
from moerge_ext.files.shard_writer import ShardWriter

N = 3


def olmo2():
    return builders._build(transformers.Olmo2ForCausalLM, transformers.Olmo2Config(**_DECODER))


MODELS = {
    "llama": (builders.tiny_llama, "MixtralForCausalLM"),
    "mistral": (builders.tiny_mistral, "MixtralForCausalLM"),
    "qwen2": (builders.tiny_qwen2, "Qwen2MoeForCausalLM"),
    "qwen3": (builders.tiny_qwen3, "Qwen3MoeForCausalLM"),
    "olmo2": (olmo2, "FlexOlmoForCausalLM"),
}
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def branches(kind: str, count: int = N, spread: float = 0.05) -> list:
    """Copies of one model that went apart."""
    seed, random = MODELS[kind][0](), torch.Generator().manual_seed(1)
    made = [copy.deepcopy(seed) for _ in range(count)]
    with torch.no_grad():
        for p in (p for model in made for p in model.parameters()):
            p.add_(spread * torch.randn(p.shape, generator=random))
    return made


def saved(models, folder, dtype=None) -> list:
    paths = [folder / name for name in ("ant", "bee", "cat", "dog")[: len(models)]]
    for model, path in zip(models, paths, strict=True):
        (model if dtype is None else copy.deepcopy(model).to(dtype)).save_pretrained(path)
    return paths


def loaded(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


class Mixed(torch.nn.Module):
    """The FFN of a mixture, in the words of the paper: computed here by the dense models' own layers."""

    def __init__(self, ffns, router, top_k):
        super().__init__()
        self.ffns, self.router, self.top_k = torch.nn.ModuleList(ffns), router, top_k

    def forward(self, x):
        scores = x @ self.router.T
        least = scores.topk(self.top_k, -1).values[..., -1:]
        weights = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        return sum(weights[..., e : e + 1] * ffn(x) for e, ffn in enumerate(self.ffns))


@pytest.mark.parametrize("kind", MODELS)
def test_the_mixture_is_the_papers(kind, tmp_path):
    models = branches(kind)
    mix = moerge.mix_models(saved(models, tmp_path), tmp_path / "mix", progress=False)
    got, want = loaded(mix.path), copy.deepcopy(models[0])
    assert type(got).__name__ == MODELS[kind][1] and mix.names == ("ant", "bee", "cat") and mix.top_k == 2
    with torch.no_grad():
        for parameters in zip(want.parameters(), *(m.parameters() for m in models), strict=True):
            parameters[0].copy_(torch.stack(parameters[1:]).double().mean(0))
        for i, layer in enumerate(want.model.layers):
            router = got.model.layers[i].mlp.gate.weight
            assert router.shape == (N, 32) and 0.1 < router.std() < 0.3  # initializer_range is 0.2
            layer.mlp = Mixed([m.model.layers[i].mlp for m in models], router, 2)
        torch.testing.assert_close(got(IDS).logits, want(IDS).logits, atol=2e-5, rtol=1e-5)
        dense = want.num_parameters() - sum(p.numel() for layer in want.model.layers for p in layer.mlp.parameters())
    assert mix.parameters == got.num_parameters() > dense
    ffn = sum(p.numel() for layer in models[0].model.layers for p in layer.mlp.parameters())
    assert mix.active == mix.parameters - ffn
    assert 0.9 < mix.agreement < 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_mixture_of_one_model_with_itself_is_that_model(kind, tmp_path):
    (model,) = branches(kind, 1)
    mix = moerge.mix_models(saved([model] * N, tmp_path), tmp_path / "mix", progress=False)
    assert mix.agreement == pytest.approx(1)
    got = loaded(mix.path)
    theirs = model.state_dict()
    for name, p in got.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(p, theirs[name]), name
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(got.generate(IDS, max_new_tokens=8), model.generate(IDS, max_new_tokens=8))


@pytest.mark.parametrize("expert", range(N))
def test_one_hot_gating_is_the_one_expert(expert, tmp_path):
    """An input of ones and a router that answers with 1000 at one place."""
    models = branches("llama")
    got = loaded(moerge.mix_models(saved(models, tmp_path), tmp_path / "mix", progress=False).path)
    x = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(2))
    x[..., 0] = 1.0
    with torch.no_grad():
        for i, layer in enumerate(got.model.layers):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[expert, 0] = 1000.0
            want = models[expert].model.layers[i].mlp(x)
            torch.testing.assert_close(layer.mlp(x), want, atol=1e-5, rtol=1e-5)
            assert (want - models[(expert + 1) % N].model.layers[i].mlp(x)).abs().max() > 0.1


def test_types_parts_tied_heads_and_what_lies_beside(tmp_path, monkeypatch):
    """bfloat16 in parts of 20 kB, means in chunks of a few rows; the head is not stored where it is the embedding."""
    monkeypatch.setattr(mix_module, "_CHUNK", 70)
    monkeypatch.setattr(mix_module, "ShardWriter", lambda folder: ShardWriter(folder, part_bytes=20_000))
    models = branches("llama", 2)
    for model in models:
        model.config.tie_word_embeddings = True
        model.tie_weights()
        model.generation_config.max_new_tokens = 5
    paths = saved(models, tmp_path, torch.bfloat16)
    for path in paths:
        make_tokenizer(path)
    mix = moerge.mix_models({"x": paths[0], "y": str(paths[1])}, tmp_path / "mix", seed=3, progress=False)
    files = {file.name for file in mix.path.iterdir()}
    assert "model-00001-of-00003.safetensors" in files and "model.safetensors" not in files
    assert len({file.stat().st_mode for file in mix.path.iterdir()}) == 1
    assert "lm_head.weight" not in json.loads((mix.path / "model.safetensors.index.json").read_text())["weight_map"]
    got = loaded(mix.path)
    assert got.dtype == torch.bfloat16 and got.lm_head.weight is got.model.embed_tokens.weight
    means = [torch.stack([m.to(torch.bfloat16).state_dict()[name].double() for m in models]).mean(0) for name in
             ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight")]  # fmt: skip
    assert torch.equal(got.model.embed_tokens.weight, means[0].bfloat16())
    assert torch.equal(got.model.layers[1].self_attn.o_proj.weight, means[1].bfloat16())
    assert got.generation_config.max_new_tokens == 5
    assert transformers.AutoTokenizer.from_pretrained(mix.path)("ab").input_ids == [3, 4]
    assert json.loads((mix.path / "moerge_mix.json").read_text())["experts"] == ["x", "y"]
    again = moerge.mix_models(paths, tmp_path / "again", seed=3, dtype="float32", progress=False)
    wide = loaded(again.path)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.model.layers[0].mlp.gate.weight.bfloat16(), got.model.layers[0].mlp.gate.weight)
    assert torch.equal(wide.model.embed_tokens.weight, means[0].float())


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path):
    models = branches("llama")
    paths = saved(models, tmp_path)
    out = tmp_path / "mix"

    def refused(message, models, **options):
        with pytest.raises(ValueError, match=message):
            moerge.mix_models(models, out, progress=False, **options)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refused("two models or more are needed, got 1", paths[:1])
    refused("several folders or hub ids, got", str(paths[0]))
    refused("top_k must be from 1 to 3, the number of models, got 4", paths, top_k=4)
    refused("dtype must be float32, bfloat16 or float16, got 'int8'", paths, dtype="int8")
    refused("several models are called ant", [paths[0], paths[0]])
    builders.tiny_gpt2().save_pretrained(tmp_path / "gpt")
    refused("type 'gpt2' have no mixture .*llama -> mixtral", [tmp_path / "gpt", paths[0]])
    deep = builders._build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER | {"rope_theta": 5.0}))
    deep.save_pretrained(tmp_path / "deep")
    refused("config: rope_parameters is .*10000.*in ant, .*5.0.*in deep", [paths[0], tmp_path / "deep"])
    wide = builders._build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER | {"vocab_size": 97}))
    wide.save_pretrained(tmp_path / "wide")
    refused(r"wide: model.embed_tokens.weight is \[97, 32\], expected \[96, 32\]", [paths[0], tmp_path / "wide"])
    biased = transformers.LlamaConfig(**_DECODER, attention_bias=True)
    builders._build(transformers.LlamaForCausalLM, biased).save_pretrained(tmp_path / "biased")
    refused("mixtral cannot keep .*attention_bias=True", [tmp_path / "biased", paths[0]])
    half = copy.deepcopy(models[1]).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    refused("several types .*ant in F32, half in F16", [paths[0], tmp_path / "half"])
    make_tokenizer(paths[0])
    refused("bee, cat has no tokenizer, ant has one", paths)
    make_tokenizer(paths[1])
    tokens = json.loads((paths[1] / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {"a": tokens["model"]["vocab"]["b"], "b": tokens["model"]["vocab"]["a"]}
    (paths[1] / "tokenizer.json").write_text(json.dumps(tokens))
    refused("tokenizers of ant and bee differ in 2 tokens, such as 'a' \\(3 and 4\\)", paths[:2])
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    refused("model 'lora': .* is an adapter, not a model", [paths[0], tmp_path / "lora"])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ValueError, match="is there already"):
        moerge.mix_models(paths[1:], tmp_path / "there", progress=False)


def test_broken_files_are_named(tmp_path):
    models = branches("llama", 2)
    paths = saved(models, tmp_path)
    tensors = load_file(paths[1] / "model.safetensors")

    def refused(message, change):
        save_file(change({name: t.clone() for name, t in tensors.items()}), paths[1] / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            moerge.mix_models(paths, tmp_path / "mix", progress=False)
        assert not (tmp_path / "mix").exists() and not list(tmp_path.glob(".*"))

    lost = "model.layers.1.mlp.up_proj.weight"
    refused(f"bee: there is no {lost}", lambda t: {name: p for name, p in t.items() if name != lost})
    refused("bee: extra.weight is no tensor of its architecture", lambda t: t | {"extra.weight": torch.zeros(2)})
    refused(f"bee.*{lost} is stored as I8: quantized", lambda t: t | {lost: torch.zeros(2, dtype=torch.int8)})
    norm = "model.norm.weight"
    refused(f"{norm} of bee has values that are not finite", lambda t: t | {norm: t[norm] * torch.inf})
    (paths[1] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model 'bee': .* has no model.safetensors: load it .* and save it again"):
        moerge.mix_models(paths, tmp_path / "mix", progress=False)


def test_models_without_a_common_origin_are_warned_of(tmp_path):
    models = branches("llama", 2, spread=5.0)
    with pytest.warns(UserWarning, match=r"agree by 0.5\d \(1: equal, 0.50: unrelated\): are ant, bee fine-tuned from"):
        moerge.mix_models(saved(models, tmp_path), tmp_path / "mix", progress=False)


def test_a_kill_leaves_no_folder(tmp_path, monkeypatch):
    paths = saved(branches("llama", 2), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mix_module._Mixing, "_beside", killed)
    with pytest.raises(KeyboardInterrupt):
        moerge.mix_models(paths, tmp_path / "mix", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ant", "bee"]
