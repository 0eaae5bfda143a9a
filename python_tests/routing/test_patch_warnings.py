"""What patch says of experts that fit and may not be meant: alone in a module, of another base, on a head of chance."""

from __future__ import annotations

import warnings
from pathlib import Path

import builders
import patch_cases as cases
import pytest
import torch
import transformers
from patch_cases import logits, tokens

import moerge_ext as moerge
from moerge_ext.experts.formats.peft import write_gates
from moerge_ext.experts.gates import read_gates
from moerge_ext.training.gated_lora import gated_model

DOWN = "model.layers.1.mlp.down_proj"


def notes(*args, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        moerge.patch(*args, **options).remove()
    return [str(warning.message) for warning in caught if str(warning.message).startswith("patch: ")]


@pytest.fixture
def llama():
    return cases.build("llama")


@pytest.fixture
def uneven(tmp_path, llama):
    """ant has q_proj and down_proj, bee and cat q_proj alone."""
    folders = builders.random_experts(llama, tmp_path, ["ant"], ("q_proj", "down_proj"))
    return moerge.load_experts(folders | builders.random_experts(llama, tmp_path, ["bee", "cat"], ("q_proj",), seed=1))


@pytest.mark.parametrize("method", ["phatgoose", "arrow_peft"])
def test_alone_in_a_module(llama, uneven, method):
    """The only expert of a module gets weight 1 there; one warning names the modules."""
    (note,) = notes(llama, uneven, method=method)
    assert (
        "in 2 of 4 modules one expert is alone" in note and f"{DOWN} (only 'ant')" in note and 'absent="base"' in note
    )
    assert not notes(llama, uneven, method=method, absent="base")
    assert not notes(llama, uneven, method="merged") and not notes(llama, uneven, method="expert:bee")
    with pytest.warns(UserWarning, match="alone"):
        handle = moerge.patch(llama, uneven, method=method)
    with handle.record() as trace:
        logits(llama, input_ids=tokens())
    assert trace.load()[DOWN].tolist() == [tokens().numel(), 0, 0]


@pytest.mark.parametrize("others", [["bee"], ["bee", "cat"]])
def test_gates_in_some_modules_alone(tmp_path, llama, others):
    """An expert is left out where it has a LoRA and no gate: said, and not as if it had no LoRA there."""
    folders = builders.random_experts(llama, tmp_path, ["ant", *others], ("q_proj", "down_proj"))
    gates = read_gates(folders["ant"])["sigmoid-gate"].gates
    kept = {path: gate for path, gate in gates.items() if path != DOWN}
    write_gates(folders["ant"], kept, kind="sigmoid-gate", base_model="tiny")
    experts = moerge.load_experts(folders)
    *alone, note = notes(llama, experts)
    assert f"expert 'ant' has no gate of kind 'sigmoid-gate' in 1 of its 4 modules, such as {DOWN}" in note
    assert "moerge train-gates" in note and len(alone) == (len(others) == 1)
    assert all(f"{DOWN} (only 'bee'). Others have a LoRA there, but nothing" in said for said in alone)
    assert not notes(llama, experts, "arrow", top_k=2)
    handle = moerge.patch(llama, moerge.load_experts({name: folders[name] for name in others}), top_k=1, spare=1)
    with handle, pytest.warns(UserWarning, match="'ant' has no gate of kind 'sigmoid-gate' in 1 of its 4 modules"):
        handle.add_expert(folders["ant"])


def test_the_others_compete_as_zero_branches(llama, uneven):
    """absent="base": y = base + w_ant B A u, w the softmax over ant's score and the zeros of the others."""
    with moerge.patch(llama, uneven, method="phatgoose", top_k=3, absent="base"):
        layer = llama.get_submodule(DOWN)
        x = torch.randn(5, 48)
        got = layer(x)
        assert layer.mask is None
        gate = layer.gates[0]
        score = (torch.nn.functional.layer_norm(x, (48,)) @ gate) / 48**0.5
        weight = score.exp() / (score.exp() + 2)
        branch = x @ layer.lora_A[0].T @ layer.lora_B[0].T
        torch.testing.assert_close(got, layer.base_layer(x) + weight[:, None] * branch, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="absent must be 'mask' or 'base', got 'zero'"):
        moerge.patch(llama, uneven, absent="zero")


def test_absent_experts_keep_their_affinity(llama, uneven):
    """What the handle adds to the score of an absent expert counts: all of it on bee leaves the base alone."""
    with moerge.patch(llama, uneven, method="glider_code", top_k=1, absent="base") as handle:
        layer = llama.get_submodule(DOWN)
        with handle.affinities(torch.tensor([-50.0, 50.0, -50.0])):
            x = torch.randn(5, 48)
            assert torch.equal(layer(x), layer.base_layer(x))


def bank_on(base, folder, revision=None):
    config = {"base_model_name_or_path": base, "revision": revision}
    q = "model.layers.0.self_attn.q_proj"
    builders.write_adapter(folder, {q: (torch.randn(4, 32), torch.randn(32, 4))}, **config)
    return moerge.load_experts({"sql": folder})


@pytest.mark.parametrize(
    "base, own, other",
    [
        ("org/base", "org/base", False),
        ("org/base", "/models/Base/", False),
        ("/data/base", "base", False),
        ("org/base", "/cache/models--org--base/snapshots/0123abc", False),
        ("org/base", "", False),
        (None, "org/base", False),
        ("org/base", "org/base-instruct", True),
        ("org/base-8b", "/models/base-13b", True),
        ("org/base-8b", Path("/models/base-13b"), True),
    ],
)
def test_another_base(llama, tmp_path, base, own, other):
    llama.config._name_or_path = own
    said = notes(llama, bank_on(base, tmp_path / "e"), method="expert:sql")
    assert bool(said) == other
    if other:
        assert "'sql' on " in said[0] and f"'{base}'" in said[0] and f"'{own}'" in said[0] and len(said) == 1


def test_gates_of_another_base(llama, tmp_path):
    bank = bank_on("org/base-8b", tmp_path / "e")
    llama.config._name_or_path = "org/base-13b"
    with pytest.warns(UserWarning, match="trained on another model"), gated_model(llama, bank.folders[0]) as gated:
        gated.save(untrained=())
    again = moerge.load_experts({"sql": bank.folders[0]})

    def said(method):
        return [note for note in notes(llama, again, method=method) if "another model" in note]

    (note,) = said("phatgoose")
    assert "'sql' on 'org/base-8b'" in note and "gates" not in note
    llama.config._name_or_path = "mirror/base-8b"
    (note,) = said("phatgoose")
    assert "gates were made on another model" in note and "those of 'sql' on 'org/base-13b'" in note
    assert not said("merged")
    again.set_gates("sql", again.get_gates("sql"))
    assert not said("phatgoose")


def test_another_revision(llama, tmp_path):
    llama.config._name_or_path, llama.config._commit_hash = "org/base", "a" * 40
    for i, (revision, other) in enumerate(
        [("main", False), (None, False), ("a" * 40, False), ("a" * 7, False), ("b" * 40, True)]
    ):
        said = notes(llama, bank_on("org/base", tmp_path / str(i), revision), method="expert:sql")
        assert bool(said) == other, revision
    assert "b" * 40 in said[0] and "a" * 40 in said[0]


def on_head(model, head, folder):
    layer = model.get_submodule(head)
    factors = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
    return moerge.load_experts({"e": builders.write_adapter(folder, {head: factors}, base_model_name_or_path=None)})


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_freshly_initialised_head(llama, tmp_path):
    """LoRA on a head that the checkpoint does not have; none is said of one that it has."""
    llama.save_pretrained(tmp_path / "base")
    fresh = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base", pad_token_id=0)
    bank = on_head(fresh, "score", tmp_path / "e")
    (note,) = notes(fresh, bank, method="expert:e")
    assert "LoRA on score" in note and "freshly initialised" in note
    fresh.save_pretrained(tmp_path / "trained")
    trained = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "trained", pad_token_id=0)
    assert not notes(trained, bank, method="expert:e")
    assert notes(builders.tiny_bert(), on_head(builders.tiny_bert(), "classifier", tmp_path / "b"), method="expert:e")
    assert not notes(llama, on_head(llama, "lm_head", tmp_path / "l"), method="expert:e")


def test_a_warning_that_is_an_error_leaves_the_model_alone(tmp_path, llama, uneven):
    before = cases.snapshot(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="patch: "):
            moerge.patch(llama, uneven, "arrow")  # fewer experts than arrow's own top_k
    assert cases.same(before, cases.snapshot(llama))
    with pytest.raises(ValueError, match="not patched"):
        moerge.get_handle(llama)


def test_a_warning_that_is_an_error_adds_no_expert(tmp_path, llama):
    folders = builders.random_experts(llama, tmp_path, ["ant", "bee"], ("q_proj",))
    other = moerge.load_experts({"bee": folders["bee"]})
    other.bases = [("someone/another-model", None)]
    llama.config._name_or_path = "someone/this-model"
    with moerge.patch(llama, moerge.load_experts({"ant": folders["ant"]}), "arrow", top_k=1, spare=2) as handle:
        want = logits(llama, input_ids=tokens())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="add_expert: .*another-model"):
                handle.add_expert(other)
        assert handle.names == ("ant",)
        assert torch.equal(logits(llama, input_ids=tokens()), want)
        with pytest.warns(UserWarning, match="another-model"):
            handle.add_expert(other)
        assert handle.names == ("ant", "bee")
