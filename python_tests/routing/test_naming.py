"""Adapters whose module paths are not the model's: renaming tables, other classes, wrappers, parts that are gone."""

from __future__ import annotations

import warnings

import builders
import naming_cases as cases
import pytest
import torch
import transformers
from naming_cases import RENAMED, adapter, inputs, linear_layers
from peft import PeftModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import moerge_ext as moerge
from moerge_ext.routing.naming import ModelPaths
from moerge_ext.training.gated_lora import gated_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:patch. the experts' modules have other names")


@torch.no_grad()
def logits(model, **given):
    return model(**(given or inputs(model))).logits


def routed(model, folder, **options):
    """The logits with the expert alone."""
    bank = moerge.load_experts({"e": folder})
    with moerge.patch(model, bank, method="expert:e", **options):
        return logits(model)


def said(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "patch: " in str(warning.message)]


@pytest.mark.parametrize("family", RENAMED)
def test_names_of_an_older_transformers(family, tmp_path):
    """The old names give the forward of the new ones, and that of PEFT; what was renamed is said once."""
    build, old_name = RENAMED[family]
    model = build()
    layers = {path: sizes for path, sizes in linear_layers(model).items() if path not in ("lm_head", "classifier")}
    if all(old_name(path) == path for path in layers):
        pytest.skip("needs a newer transformers: this one has the old names")
    old, new = adapter(tmp_path / "old", layers, old_name), adapter(tmp_path / "new", layers)
    got = routed(model, old)
    torch.testing.assert_close(got, routed(model, new), rtol=0, atol=0)
    assert (got - logits(model)).abs().max() > 0.01
    text = {path: sizes for path, sizes in layers.items() if "visual" not in path}  # PEFT takes the last parts of paths
    peft = PeftModel.from_pretrained(build(), str(adapter(tmp_path / "text", text))).eval()
    got = routed(model, adapter(tmp_path / "old-text", text, old_name))
    torch.testing.assert_close(got, logits(peft, **inputs(model)), rtol=0, atol=1e-6)
    (note,) = said(lambda: routed(model, old))
    some = next(iter(layers))
    assert "transformers' table" in note and type(model).__name__ in note and f"{len(layers)} modules" in note, note
    assert any(f"{old_name(path)} -> {path}" in note for path in layers), (note, some)


def test_both_namings_in_one_bank(tmp_path):
    """One expert trained before the renaming, one after: they meet in the same layers."""
    model = cases.llava()
    layers = linear_layers(model, "language_model")
    folders = {
        "old": adapter(tmp_path / "old", layers, cases.old_llava, seed=0),
        "new": adapter(tmp_path / "new", layers, seed=1),
    }
    same = {name: adapter(tmp_path / f"{name}-same", layers, seed=seed) for seed, name in enumerate(folders)}
    results = []
    for named in (folders, same):
        bank = moerge.load_experts(named)
        bank.set_gates("old", {path: torch.ones(m.in_features) for path, m in bank.modules.items() if m.present[0]})
        bank.set_gates("new", {path: -torch.ones(m.in_features) for path, m in bank.modules.items() if m.present[1]})
        for method in ("arrow", "phatgoose", "merged"):
            options = {} if method == "merged" else {"top_k": 2}
            with moerge.patch(model, bank, method=method, **options) as handle:
                assert set(handle.modules) == set(layers)
                results.append(logits(model))
    for old, new in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


CLASSES = {
    "text on wrapper": ("LlamaForCausalLM", "model.language_model.", "model."),
    "inner text on wrapper": ("LlamaModel", "model.language_model.", ""),
    "wrapper on text": ("Llava", "model.", "model.language_model."),
    "old wrapper on text": ("Llava before 4.52", "model.", "language_model.model."),
    "inner wrapper on wrapper": ("LlavaModel", "model.", ""),
}


@pytest.mark.parametrize("case", CLASSES)
def test_text_class_against_wrapper_class(case, tmp_path):
    _, here, there = CLASSES[case]
    model = builders.tiny_llama() if "on text" in case else cases.llava()
    layers = {path: sizes for path, sizes in linear_layers(model).items() if path.startswith(here)}
    old = adapter(tmp_path / "old", layers, lambda path: there + path.removeprefix(here))
    new = adapter(tmp_path / "new", layers)
    assert torch.equal(routed(model, old), routed(model, new))


def test_base_class_with_and_without_a_head(tmp_path):
    model = builders.tiny_bert()
    layers = linear_layers(model, "bert.encoder")
    bare = adapter(tmp_path / "bare", layers, lambda path: path.removeprefix("bert."))
    new = adapter(tmp_path / "new", layers)
    assert torch.equal(routed(model, bare), routed(model, new))
    inner = model.bert
    with moerge.patch(inner, moerge.load_experts({"e": new}), method="expert:e") as handle:
        assert set(handle.modules) == {path.removeprefix("bert.") for path in layers}


def test_the_old_names_of_a_class_without_its_head(tmp_path):
    """Table and prefix together: an adapter of ViTModel of transformers 4 on a classifier of transformers 5."""
    model = cases.vit()
    layers = linear_layers(model, "vit.layers")
    if not layers:
        pytest.skip("needs a newer transformers: this one has the old names")
    old = adapter(tmp_path / "old", layers, lambda path: cases.old_vit(path).removeprefix("vit."))
    assert torch.equal(routed(model, old), routed(model, adapter(tmp_path / "new", layers)))


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_the_head_as_tinker_calls_it(prefix, tmp_path):
    """`unembed_tokens`, inside of the text model, alone or beside other layers."""
    model = builders.tiny_llama()
    head = {"lm_head": tuple(reversed(model.lm_head.weight.shape))}

    def theirs(path):
        return f"{prefix}.unembed_tokens" if path == "lm_head" else path.replace("model", prefix, 1)

    for count, layers in enumerate((linear_layers(model, "model.layers") | head, head)):
        old = adapter(tmp_path / f"old{count}", layers, theirs)
        new = adapter(tmp_path / f"new{count}", layers)
        assert torch.equal(routed(model, old), routed(model, new))


def test_another_model_is_not_taken_for_a_prefix(tmp_path):
    """bert. and roberta. are two models; the error says what would rename it."""
    model = builders.tiny_bert()
    layers = linear_layers(model, "bert.encoder")
    folder = adapter(tmp_path / "e", layers, lambda path: path.replace("bert", "roberta"))
    with pytest.raises(ValueError) as caught:
        routed(model, folder)
    message = str(caught.value)
    assert "rename={'roberta': 'bert'}" in message and f"and {len(layers) - 3} more modules" in message, message
    assert message.count("\n") == 1
    bank = moerge.load_experts({"e": folder}, rename={"roberta": "bert"})
    with moerge.patch(model, bank, method="expert:e"):
        got = logits(model, input_ids=torch.arange(3, 9)[None])
    with moerge.patch(model, moerge.load_experts({"e": adapter(tmp_path / "n", layers)}), method="expert:e"):
        assert torch.equal(got, logits(model, input_ids=torch.arange(3, 9)[None]))


class Towers(nn.Module):
    """Two encoders alike: a prefix cannot be told."""

    def __init__(self, names):
        super().__init__()
        for name in names:
            self.add_module(name, nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 8)})])}))


def test_a_prefix_that_two_towers_fit_is_refused(tmp_path):
    folder = adapter(tmp_path / "e", {"layers.0.q": (8, 8)})
    with pytest.raises(ValueError, match=r"not in Towers"):
        moerge.patch(Towers(["left", "right"]), moerge.load_experts({"e": folder}), method="expert:e")
    with moerge.patch(Towers(["left"]), moerge.load_experts({"e": folder}), method="expert:e") as handle:
        assert handle.modules == ("left.layers.0.q",)


def test_layers_are_never_exchanged(tmp_path):
    """The number of a layer is part of its name."""
    folder = adapter(tmp_path / "e", {"model.layers.7.self_attn.q_proj": (32, 32)})
    with pytest.raises(ValueError, match=r"model.layers.7.self_attn.q_proj' of the experts is not in Llama"):
        moerge.patch(builders.tiny_llama(), moerge.load_experts({"e": folder}), method="expert:e")


def test_a_wrapped_model(tmp_path):
    """The model's own wrappers are looked through, in its paths and around it."""
    model = builders.tiny_llama()
    layers = linear_layers(model, "layers.")
    folder = adapter(tmp_path / "e", layers)
    want = routed(model, folder)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = checkpoint_wrapper(layer)
    torch.testing.assert_close(routed(model, folder), want)

    class Around(nn.Module):  # as DistributedDataParallel is
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **given):
            return self.module(**given)

    around = Around(model)
    with moerge.patch(around, moerge.load_experts({"e": folder}), method="expert:e") as handle:
        assert all(name.startswith("module.") for name in handle.modules)
        torch.testing.assert_close(logits(around, **inputs(model)), want)
    named = moerge.load_experts({"e": folder}, rename={"": "module"})  # by the wrapper's own names
    plain = Around(builders.tiny_llama())
    assert not said(lambda: moerge.patch(plain, named, method="expert:e").remove())
    assert not any(isinstance(module, moerge.RoutedLinear) for module in around.modules())


def test_modules_that_are_gone(tmp_path):
    """Refused in one line with the mend; left out with a warning under missing="drop"."""
    model = builders.tiny_llama()
    layers = linear_layers(model, "self_attn")
    gone = {f"model.layers.{i}.self_attn.{name}": (32, 16) for i in (2, 3) for name in ("k_norm", "v_norm")}
    bank = moerge.load_experts({"e": adapter(tmp_path / "e", layers | gone)})
    with pytest.raises(ValueError) as caught:
        moerge.patch(model, bank, method="expert:e")
    assert 'missing="drop"' in str(caught.value) and str(caught.value).count("\n") == 1, caught.value
    (note,) = said(lambda: moerge.patch(model, bank, method="expert:e", missing="drop"))
    assert "4 modules of 'e' are not in LlamaForCausalLM" in note and "model.layers.2.self_attn.k_norm" in note
    assert set(moerge.get_handle(model).modules) == set(layers)
    moerge.get_handle(model).remove()
    nothing = moerge.load_experts({"e": adapter(tmp_path / "none", gone)})
    with pytest.raises(ValueError, match="none of the experts' modules is in LlamaForCausalLM .*rename="):
        moerge.patch(model, nothing, method="expert:e", missing="drop")
    with pytest.raises(ValueError, match="missing must be 'error' or 'drop', got 'skip'"):
        moerge.patch(model, bank, method="expert:e", missing="skip")


def test_keys_and_values_that_layers_share(tmp_path):
    """Gemma 3n lost k_proj and v_proj of the layers that share them; adapters of before have both."""
    model = cases.gemma3n()
    layers = linear_layers(model, "self_attn")
    if "model.layers.2.self_attn.k_proj" in layers:
        pytest.skip("needs a newer transformers: in this one the layers still have them")
    first = {path: sizes for path, sizes in layers.items() if ".0." in path}
    before = {path.replace(".0.", f".{i}."): sizes for i in range(4) for path, sizes in first.items()}
    folder = adapter(tmp_path / "e", before)
    with pytest.raises(ValueError, match=r"model.layers.2.self_attn.k_proj[\s\S]*missing=\"drop\""):
        routed(model, folder)
    with pytest.warns(UserWarning, match="4 modules of 'e' are not in Gemma3nForCausalLM"):
        handle = moerge.patch(model, moerge.load_experts({"e": folder}), method="expert:e", missing="drop")
    assert set(handle.modules) == set(layers) and len(before) == len(layers) + 4


def test_old_names_and_parts_that_are_gone(tmp_path):
    model = cases.gemma3()
    layers = linear_layers(model, "language_model")
    gone = {"model.language_model.layers.2.self_attn.k_proj": (32, 16)}
    folder = adapter(tmp_path / "e", layers | gone, cases.old_llava)
    assert torch.equal(routed(model, folder, missing="drop"), routed(model, adapter(tmp_path / "new", layers)))


def test_fused_modules_that_cannot_be_routed_are_one_cause(tmp_path):
    """LoRA on Mixtral's experts under kernels that leave no place for it: one line, and attention is usable."""
    config = transformers.MixtralConfig(**cases.TEXT, num_local_experts=2)
    model = builders._build(transformers.MixtralForCausalLM, config)
    attention = linear_layers(model, "self_attn")
    fused = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": (32, 48)
        for i in (0, 1)
        for e in (0, 1)
        for w in ("w1", "w3")
    }
    folder = adapter(tmp_path / "e", attention | fused)
    model.config._experts_implementation = "sonicmoe"
    with pytest.raises(ValueError) as caught:
        moerge.patch(model, moerge.load_experts({"e": folder}), method="expert:e")
    message = str(caught.value)
    assert message.count("\n") == 1 and "MixtralExperts" in message and "'sonicmoe'" in message, message
    part = moerge.load_experts({"e": folder}, modules="self_attn")
    with moerge.patch(model, part, method="expert:e") as handle:
        assert set(handle.modules) == set(attention)


def test_the_table_of_a_models_own_code(tmp_path):
    """As models with remote code bring it, and transformers 4 had it."""
    model = builders.tiny_llama()
    model._checkpoint_conversion_mapping = {r"^lm\.blocks\.": "^model.layers.", "attention": "self_attn"}
    layers = linear_layers(model, "layers.")
    new = routed(model, adapter(tmp_path / "new", layers))
    old = adapter(tmp_path / "old", layers, lambda path: path.replace("model.layers", "lm.blocks"))
    assert torch.equal(routed(model, old), new)
    (note,) = said(lambda: routed(model, old))
    assert "the table in LlamaForCausalLM" in note


def test_gates_are_trained_under_the_adapters_own_names(tmp_path):
    model = cases.qwen2_vl()
    layers = linear_layers(model, "language_model")
    folder = adapter(tmp_path / "e", layers, cases.old_qwen)
    with pytest.warns(UserWarning, match="have other names in this model"), gated_model(model, folder) as gated:
        assert set(gated.layers) == {cases.old_qwen(path) for path in layers}
        some = next(iter(layers))
        assert model.get_submodule(some) is gated.layers[cases.old_qwen(some)]
        gated.save()
    assert isinstance(model.get_submodule(some), nn.Linear)
    bank = moerge.load_experts({"e": folder})
    with moerge.patch(model, bank, method="phatgoose", top_k=1) as handle:
        assert set(handle.modules) == set(layers)


@pytest.mark.alone
def test_many_names_are_matched_in_linear_time():
    """18,000 names that are not there: seconds, not minutes."""
    import time

    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(64)) for _ in range(280))}
    )
    paths = ModelPaths(model)
    wanted = {f"other.layers.{i}.{e}.w": (2, 2) for i in range(280) for e in range(64)}
    start = time.perf_counter()
    naming = paths.naming(wanted)
    assert len(naming.missing) == len(wanted) == 17920
    for path in naming.missing:
        paths.near(path)
    assert time.perf_counter() - start < 5
