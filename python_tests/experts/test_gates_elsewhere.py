"""Gates that lie elsewhere than beside their adapter, and how they are known to be its own."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from builders import random_experts, write_adapter
from gate_builders import batches, llama

import moerge_ext as moerge
from moerge_ext.experts.formats.peft import read_gates, write_gates
from moerge_ext.experts.prompt_notes import note_of_prompt, warn_of_other_prompts

Q, K = "layers.0.q_proj", "layers.0.k_proj"
EMBEDDER = moerge.Embedder(lambda texts: torch.ones(len(texts), 4), name="some")


def seeded(seed, d=8, o=6, r=4):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(r, d, generator=random), torch.randn(o, r, generator=random)


@pytest.fixture
def pair(tmp_path):
    """Two adapters of the same modules, without gates."""
    for name in "ab":
        write_adapter(tmp_path / name, {Q: seeded(ord(name)), K: seeded(ord(name) + 9)})
    return tmp_path


def saved(pair, name, folder, value=1.0, **options):
    bank = moerge.load_experts(pair / name)
    bank.set_gates(name, {Q: torch.full((8,), value)}, **options)
    return bank.save_gates({name: pair / folder}, **{"kind": "sigmoid-gate"} | options)[0]


def test_folder_file_and_kinds(pair):
    file = saved(pair, "a", "gates")
    saved(pair, "a", "a", 5.0)
    saved(pair, "a", "a", 7.0, kind="average-activation")
    shutil.copyfile(file, pair / "any name.safetensors")
    for place in (pair / "gates", file, pair / "any name.safetensors"):
        bank = moerge.load_experts([pair / "a", pair / "b"], gates={"a": place})
        assert bank.get_gates("a")[Q].tolist() == [1.0] * 8  # in place of those of its kind beside it
        assert bank.get_gates("a", "average-activation")[Q].tolist() == [7.0] * 8
        assert bank.gated("sigmoid-gate") == {0} and bank.folders[0] == (pair / "a").resolve()
        assert bank.places("a") == [place, (pair / "a").resolve()] and bank.to(dtype=torch.float64).sidecars
    bank = moerge.load_experts(pair / "a", gates={"a": pair / "gates"}, rename={"layers": "h"}, modules="q_proj")
    assert bank.get_gates("a").keys() == {"h.0.q_proj"}


@pytest.mark.parametrize("how", ["digest", "digest of a part", "base", "module", "examples"])
def test_gates_of_another_adapter_are_refused(pair, how):
    folder, options = pair / "gates", {}
    if how.startswith("digest"):
        saved(pair, "b", "gates")
        text = "gates in .*gates were made for adapter 'b' on 'tiny', which is not this one .on 'tiny'."
        options = {"modules": "q_proj"} if "part" in how else {}
    elif how == "base":
        folder.mkdir()
        write_gates(folder, {Q: torch.ones(8)}, kind="sigmoid-gate", base_model="hub/other")
        text = "made for an adapter on 'hub/other', which is not this one .on 'tiny'."
    elif how == "module":
        folder.mkdir()
        write_gates(folder, {"layers.9.q_proj": torch.ones(8)}, kind="sigmoid-gate")
        text = "layers.9.q_proj: a gate for a module without LoRA weights in this adapter"
    else:
        moerge.index_examples(pair / "b", [{"text": "x"}], EMBEDDER, output_dir=folder)
        text = "examples of moerge_examples.some.safetensors in .* made for adapter 'b', which is not"
    with pytest.raises(ValueError, match=f"expert 'a': .*{text}"):
        moerge.load_experts(pair / "a", gates={"a": folder}, **options)
    if how in ("digest", "examples"):
        assert moerge.load_experts(pair / "b", gates={"b": folder}).names == ("b",)


@pytest.mark.parametrize(
    ("gates", "text"),
    [
        ({"c": "gates"}, "gates for 'c', which is no expert here; there are a, b"),
        ({"a": "nowhere/at/all"}, "gates of 'a': "),
        ({"a": "."}, "there are neither gates nor indexed examples in"),
        ({"a": "a/adapter_config.json"}, "adapter_config.json cannot be used|not a valid safetensors"),
        (["gates"], "gates must be .expert name: folder or file., got list"),
    ],
)
def test_what_is_not_there(pair, gates, text, monkeypatch):
    monkeypatch.chdir(pair)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match=text):
        moerge.load_experts(["a", "b"], gates=gates)


def test_gates_beside_an_adapter_that_was_trained_anew(pair):
    saved(pair, "a", "a")
    write_adapter(pair / "a", {Q: seeded(99), K: seeded(100)})
    with pytest.warns(UserWarning, match="expert 'a': its sigmoid-gate gates were made for other weights"):
        moerge.load_experts(pair / "a")
    saved(pair, "b", "a")
    with pytest.warns(UserWarning, match="than the adapter has .those of 'b', says the file.: make them again"):
        moerge.load_experts(pair / "a")


def test_the_part_that_is_not_taken_may_be_wrong(pair):
    saved(pair, "a", "gates")
    write_adapter(pair / "a", {Q: seeded(ord("a")), K: (torch.ones(4, 8), torch.ones(6, 3))})
    with pytest.warns(UserWarning, match="are its own is not known"):
        bank = moerge.load_experts(pair / "a", gates={"a": pair / "gates"}, modules="q_proj")
    assert bank.gated("sigmoid-gate") == {0}


def test_a_live_model_with_gates_of_its_folder(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    random_experts(model, tmp_path, ["a", "b"], ["q_proj"], gates=False)
    for name in "ab":
        moerge.train_gates(
            model, tmp_path / name, batches(), steps=1, output_dir=tmp_path / f"{name}-g", progress=False
        )
    live = peft.PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    assert moerge.load_experts(live, gates={"a": tmp_path / "a-g"}).gated("sigmoid-gate") == {0}
    with pytest.raises(ValueError, match="made for adapter 'b'"):
        moerge.load_experts(live, gates={"a": tmp_path / "b-g"})


def test_everything_made_for_a_hub_adapter_goes_elsewhere(tmp_path, monkeypatch):
    model = llama()
    cache = tmp_path / "models--user--sql" / "snapshots" / "0123"
    random_experts(model, cache, ["sub"], ["q_proj"], gates=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(cache))
    before = {file.name for file in (cache / "sub").iterdir()}
    hub, out, quiet = "user/sql/sub@main", tmp_path / "out", {"progress": False}
    for make in (
        lambda **output: moerge.train_gates(model, hub, batches(), steps=1, **quiet, **output),
        lambda **output: moerge.average_activation(model, hub, batches(), **quiet, **output),
        lambda **output: moerge.describe(hub, [], EMBEDDER, instruction="write SQL", **output),
        lambda **output: moerge.index_examples(hub, [{"text": "x"}], EMBEDDER, **output),
    ):
        with pytest.raises(ValueError, match="is an adapter of the hub, whose cache is not written to"):
            make()
        make(output_dir=out)
    assert {file.name for file in (cache / "sub").iterdir()} == before
    bank = moerge.load_experts(hub, gates={"sub": out})
    assert bank.gate_kinds == ("average-activation", "instruction-embedding", "sigmoid-gate")
    assert all(gates.metadata["adapter_name"] == "sub" for gates in read_gates(out).values())
    assert len(moerge.ExampleRouter(bank, EMBEDDER).indices) == 1
    with pytest.raises(ValueError, match="is of the hub's cache; pass folders="):
        bank.save_gates()


def test_jointly_trained_gates_are_those_of_the_new_adapter(tmp_path):
    model = llama()
    random_experts(model, tmp_path, ["a"], ["q_proj"], gates=False)
    moerge.train_gates(
        model, tmp_path / "a", batches(), steps=2, joint=True, output_dir=tmp_path / "joint", progress=False
    )
    both = {"new": tmp_path / "joint", "old": tmp_path / "a"}
    assert moerge.load_experts(both, gates={"new": tmp_path / "joint"}).gated("sigmoid-gate") == {0}
    with pytest.raises(ValueError, match="made for adapter 'a'"):
        moerge.load_experts(both, gates={"old": tmp_path / "joint"})


def test_prompt_notes_of_gates_elsewhere(pair):
    bank = moerge.load_experts(pair / "a")
    bank.set_gates("a", {Q: torch.ones(8)})
    form = moerge.PromptFormat("Q: {input}")
    bank.save_gates({"a": pair / "gates"}, metadata=note_of_prompt(form))
    with pytest.warns(UserWarning, match="Q: {input}"):
        warn_of_other_prompts(
            moerge.load_experts(pair / "a", gates={"a": pair / "gates"}), [moerge.PromptFormat("{input}")]
        )
