"""load_experts(names=, modules=, rename=), the prefixes that wrappers leave in keys, and what a live model holds."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from adapter_cases import A_KEY, B_KEY, UP, WEIGHTS, Q, factors, good_adapter, set_config, set_tensors, write_adapter
from builders import random_experts, tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats.peft import AdapterError, inspect_adapter, read_adapter, read_gates
from moerge_ext.experts.keys import bare_path, lora_key, module_of

K = Q.replace("q_proj", "k_proj")


@pytest.fixture
def folder(tmp_path):
    return good_adapter(tmp_path / "e")


@pytest.mark.parametrize(
    "old, new",
    [
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "base_model.model.module."),
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.model.", "_fsdp_wrapped_module.base_model.model.model._fsdp_wrapped_module."),
        (".layers.0.", ".layers.0._checkpoint_wrapped_module."),
        (".lora_A.", ".lora_A.default."),
        (".weight", ".my_adapter.weight"),
    ],
)
def test_wrappers_in_keys(folder, old, new):
    """What the adapter was wrapped in when it was saved changes nothing."""
    want = read_adapter("e", folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace(old, new): value for key, value in tensors.items()}, folder / WEIGHTS)
    got = read_adapter("e", folder)
    assert got.modules.keys() == want.modules.keys()
    for path, module in want.modules.items():
        assert torch.equal(got.modules[path].lora_A, module.lora_A)
        assert torch.equal(got.modules[path].lora_B, module.lora_B)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "base_model.model."])
@pytest.mark.parametrize("escaped", [False, True], ids=["plain", "regex"])
def test_wrappers_in_the_config(folder, wrapper, escaped):
    """A config made of a wrapped model names its wrappers, as the keys do."""
    tensors = load_file(folder / WEIGHTS)
    start = "base_model.model."
    save_file({key.replace(start, start + wrapper): value for key, value in tensors.items()}, folder / WEIGHTS)
    names = [wrapper + path for path in (Q, UP)]
    targets = "|".join(map(re.escape, names)) if escaped else names
    first = f"^{re.escape(names[0])}" if escaped else names[0]
    set_config(folder, target_modules=targets, alpha_pattern={first: 12})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_adapter("e", folder)
    assert {path: module.scaling for path, module in found.modules.items()} == {Q: 3.0, UP: 2.0}


def test_a_weight_that_is_there_twice(folder):
    set_tensors(folder, lambda t: t.update({A_KEY.replace("model.layers", "_orig_mod.model.layers"): t[A_KEY].clone()}))
    with pytest.raises(AdapterError, match="same weight twice"):
        read_adapter("e", folder)


def test_several_adapters_in_one_file(folder):
    def change(tensors):
        for key in (A_KEY, B_KEY):
            value = tensors.pop(key)
            for name in ("default", "ref"):
                tensors[key.replace(".weight", f".{name}.weight")] = value.clone()

    set_tensors(folder, change)
    with pytest.raises(AdapterError, match=r"several adapters \(default, ref\)") as caught:
        read_adapter("e", folder)
    assert len(caught.value.problems) == 1


def test_parts_of_keys():
    assert lora_key("x.lora_A.weight") == ("x", "A", None)
    assert lora_key("base_model.model.a.b.lora_B.default.bias") == ("a.b", "bias", "default")
    assert lora_key("x.lora_A.bias") is lora_key("x.weight") is lora_key("lora_A.weight") is None
    assert bare_path("module.module._orig_mod.x.module.y") == "x.module.y" and bare_path("module") == "module"
    assert bare_path("base_model.model") == "base_model.model" and bare_path("") == ""
    assert module_of("base_model.model.score.modules_to_save.weight") == module_of("score.weight") == "score"
    assert module_of("a.embed.lora_embedding_A") == "a.embed"


def test_modules_take_a_part(folder):
    """By a regular expression or a function; the other part is not even checked."""
    set_tensors(folder, lambda t: t.update({"base_model.model.embed.lora_embedding_A": torch.zeros(4, 9)}))
    with pytest.raises(ValueError, match="embedding"):
        load_experts(folder)
    for modules in ("q_proj$", re.compile("self_attn"), lambda path: path == Q):
        assert set(load_experts(folder, modules=modules).modules) == {Q}
    with pytest.raises(ValueError, match=r"takes none of its modules \(one of them: embed\).*names=") as caught:
        load_experts({"e": folder, "f": folder}, modules="nothing")
    assert "2 of 2 experts" in str(caught.value)
    with pytest.raises(ValueError, match="modules must be a regular expression"):
        load_experts(folder, modules="(")


@pytest.mark.parametrize(
    "rename, want",
    [
        (
            {"model.layers": "model.language_model.layers"},
            lambda p: p.replace("model.layers", "model.language_model.layers"),
        ),
        ({"model.": "text_model."}, lambda p: p.replace("model.", "text_model.", 1)),
        ({"": "backbone"}, lambda p: f"backbone.{p}"),
        ({"model": ""}, lambda p: p.removeprefix("model.")),
        (
            {"q_proj": "up_proj", "up_proj": "q_proj"},
            lambda p: p.replace("q_proj", "-").replace("up_proj", "q_proj").replace("-", "up_proj"),
        ),
        ({Q: "one", UP: "two.three"}, lambda p: {Q: "one", UP: "two.three"}[p]),
        (lambda path: path + "_2", lambda p: p + "_2"),
    ],
)
def test_rename(folder, rename, want):
    plain, renamed = load_experts(folder), load_experts(folder, rename=rename)
    assert set(renamed.modules) == {want(path) for path in plain.modules}
    for path, module in plain.modules.items():
        assert torch.equal(module.lora_A, renamed.modules[want(path)].lora_A)
        assert torch.equal(module.lora_B, renamed.modules[want(path)].lora_B)


@pytest.mark.parametrize(
    "rename, text",
    [
        ({"proj": "projection"}, "'proj', which no module path contains"),
        ({"model.layer": "x"}, "'model.layer', which no module path contains"),
        ({Q: UP}, f"rename makes it {UP}, which {UP} is already"),
        (lambda path: None, "expected a module path, got None"),
        (lambda path: "a b", "is not a module path"),
        ({}, "rename must be"),
        ({"model": 3}, "rename must be"),
        ("model", "rename must be"),
    ],
)
def test_wrong_renames(folder, rename, text):
    with pytest.raises(ValueError) as caught:
        load_experts(folder, rename=rename)
    assert text in str(caught.value), caught.value


def test_a_rename_does_not_hide_why_an_expert_is_refused(tmp_path):
    folder = write_adapter(tmp_path / "e", {Q: factors()}, r=3)
    with pytest.raises(AdapterError, match="the config says rank 3"):
        load_experts({"e": folder}, rename={"model.layers": "h"})


def test_gates_follow_their_modules(tmp_path):
    """Under new names in the bank, under the adapter's own in its folder; those of modules left out stay unread."""
    model = tiny_llama()
    folders = random_experts(model, tmp_path, ["a"], ("q_proj", "k_proj"))
    bank = load_experts(folders, modules="q_proj", rename={"model": "text"})
    stored = read_gates(folders["a"])["sigmoid-gate"].gates
    assert all(path.startswith("text.layers") and "q_proj" in path for path in bank.get_gates("a"))
    assert torch.equal(bank.get_gates("a")["text.layers.0.self_attn.q_proj"], stored["model.layers.0.self_attn.q_proj"])
    bank.save_gates({"a": write_adapter(tmp_path / "copy", {Q: factors()})})
    assert set(read_gates(tmp_path / "copy")["sigmoid-gate"].gates) == {path for path in stored if "q_proj" in path}


def test_names_choose(tmp_path):
    """Those that are not chosen are not looked at."""
    paths = {name: good_adapter(tmp_path / name) for name in "abc"}
    (paths["b"] / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"expert 'b'[\s\S]*names=\[...\] loads the others"):
        load_experts(paths)
    assert load_experts(paths, names=["c", "a"]).names == ("c", "a")
    assert load_experts(list(paths.values()), names=["c"]).names == ("c",)
    with pytest.raises(ValueError, match=r"no expert named d; there are a, b, c"):
        load_experts(paths, names=["a", "d"])
    with pytest.raises(ValueError, match="names must be a list"):
        load_experts(paths, names="abc")
    with pytest.raises(ValueError, match="names has a more than once"):
        load_experts(paths, names=["a", "c", "a"])
    with pytest.raises(ValueError, match="names is empty"):
        load_experts(paths, names=[])
    with pytest.raises(ValueError, match="experts have this name"):
        load_experts([paths["a"], paths["a"]], names=["a"])


def live_model(*names):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_()
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_reference_of_trl_is_named():
    """TRL trains against a frozen twin, the adapter "ref"."""
    model = live_model("default", "ref", "gks_0")
    with pytest.warns(UserWarning, match=r"'ref'[\s\S]*TRL[\s\S]*names=[\s\S]*gks_0"):
        assert load_experts(model).names == ("default", "ref", "gks_0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_experts(model, names=["default"]).names == ("default",)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_router_of_peft_is_no_expert(tmp_path):
    from peft import ArrowConfig, create_arrow_model

    model = live_model("sql", "french")
    for name in ("sql", "french"):
        model.save_pretrained(tmp_path, selected_adapters=[name])
    arrow = create_arrow_model(tiny_llama(), [str(tmp_path / "sql"), str(tmp_path / "french")], ArrowConfig(top_k=1))
    names = [name for name in arrow.peft_config if name != "arrow_router"]
    with pytest.raises(ValueError, match=r"arrow_router[\s\S]*Arrow router[\s\S]*names="):
        load_experts(arrow)
    bank = load_experts(arrow, names=names)
    want = load_experts([tmp_path / "sql", tmp_path / "french"])
    assert len(bank) == 2 and bank.modules.keys() == want.modules.keys()
    for path, module in want.modules.items():
        assert torch.equal(bank.modules[path].lora_B, module.lora_B)


def test_one_cause_is_one_line(tmp_path):
    """A rank that the config contradicts in forty modules."""
    paths = [f"model.layers.{i}.q_proj" for i in range(40)]
    folder = write_adapter(tmp_path / "e", {path: factors() for path in paths}, rank_pattern={"q_proj": 3})
    with pytest.raises(AdapterError) as caught:
        inspect_adapter("e", folder)
    assert len(caught.value.problems) == 40
    assert str(caught.value).count("\n") == 1 and "(37 more problems like this)" in str(caught.value)
    with pytest.raises(AdapterError, match=r"\(1 more problem like this\)"):
        inspect_adapter(
            "e", write_adapter(tmp_path / "f", dict.fromkeys(paths[:4], factors()), rank_pattern={"q_proj": 3})
        )


@pytest.mark.parametrize("live", [False, True], ids=["folder", "live"])
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [4]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["tokens", "tokens of two", "embedding"],
)
def test_the_lora_without_the_embedding(tmp_path, fields, live):
    """What was trained of the embedding is refused with the way out, and left out by it."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False, **fields))
    source = {"default": tmp_path}
    if live:
        source = model
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that it saves the embedding
            model.save_pretrained(tmp_path)
    for options in ({}, {"modules": "q_proj|embed_tokens"}):
        with pytest.raises(AdapterError, match=r"load_experts\(..., modules=...\) takes"):
            load_experts(source, **options)
    bank = load_experts(source, modules=r"layers\.")
    weights = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight
    assert torch.equal(bank.modules[Q].lora_A[0], weights) and len(bank.modules) == 2
