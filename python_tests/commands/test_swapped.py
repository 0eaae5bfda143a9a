"""An adapter where a model belongs, a model where an adapter belongs: said, before anything is read."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import llama

from moerge_ext import load_experts, patch
from moerge_ext.commands import main as cli
from moerge_ext.models.pretrained import load_model


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A model, an adapter (with a tokenizer, as trainers save one beside it), a task; their folder."""
    folder = tmp_path_factory.mktemp("swapped")
    model = llama()
    model.save_pretrained(folder / "model")
    random_experts(model, folder, ["adapter"], ["q_proj"])
    for name in ("model", "adapter"):
        make_tokenizer(folder / name)
    (folder / "task").mkdir()
    (folder / "task" / "test.jsonl").write_text(json.dumps({"input": "a:", "target": "b"}))
    return folder


def test_every_command_says_that_they_were_swapped(there, capsys, monkeypatch):
    monkeypatch.chdir(there)
    data = "--data task/test.jsonl --device cpu"
    tasks = "--tasks task --methods merged --output out"
    for model, adapter, said in (
        ("adapter", "model", "'adapter' is an adapter, made for 'tiny', not a model: it belongs to the experts"),
        ("model", "model", "it is a model (LlamaForCausalLM), not an adapter: experts are put on it"),
    ):
        for words in (
            f"generate hi --model {model} --experts {adapter}",
            f"eval --model {model} --experts {adapter} {tasks}",
            f"inspect --model {model} --experts {adapter} {tasks.replace('merged', 'arrow')}",
            f"train-gates {model} {adapter} {data} --output out",
            f"train-gates {model} {adapter} {data} --output out --kind average-activation",
            f"describe --adapter {adapter} --instruction x --embedder none --output out" if model == "model" else "",
            f"convert {adapter} converted" if model == "model" else "",
            f"train-expert {model} {data} --output out" if model == "adapter" else "",
        ):
            if words:
                assert cli.main(words.split()) == 2, words
                error = capsys.readouterr().err
                one = said if words.split()[0] in ("generate", "describe", "convert", "train-expert") else "swapped?"
                assert one in error and "swapped?" in error, (words, error)
    assert not (there / "converted").exists()


def test_in_python(there):
    with pytest.raises(ValueError, match="made for 'tiny', not a model.*swapped"):
        load_model(str(there / "adapter"), dtype="auto", device="cpu")
    with pytest.raises(ValueError, match="expert 'model'.*it is a model .LlamaForCausalLM"):
        load_experts([there / "adapter", there / "model"])
    with pytest.raises(ValueError, match="swapped: patch"):
        patch(load_experts([there / "adapter"]), llama())


def test_hub_ids(there, monkeypatch, tmp_path):
    """What the hub has under the other's id."""
    import huggingface_hub

    config = there / "adapter" / "adapter_config.json"
    monkeypatch.setattr("transformers.utils.peft_utils.cached_file", lambda *_, **__: config)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", _no_such_file)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", _no_such_file)
    from moerge_ext.models.pretrained import load_tokenizer

    with pytest.raises(ValueError, match="'user/sql' is an adapter, made for 'tiny', not a model"):
        load_tokenizer("user/sql")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(there / "model" / "config.json"))
    with pytest.raises(ValueError, match="hub repository user/base@v1: it is a model .LlamaForCausalLM"):
        load_experts(["user/base@v1"])


def _no_such_file(*_args, **_options):
    raise OSError("user/sql does not appear to have a file named config.json")
