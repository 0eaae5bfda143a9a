"""`moerge list`: a row for every adapter, also for those that cannot be used."""

from __future__ import annotations

import json

import pytest
import torch
from builders import random_experts, write_adapter
from format_cases import write_gguf, write_mlx
from gate_builders import llama

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.experts.catalogue import GATES_ONLY, catalogue
from moerge_ext.experts.manifest import MANIFEST_FILE, manifest_of
from moerge_ext.experts.prompt_notes import note_of_prompt

EMBEDDER = moerge.Embedder(lambda texts: torch.ones(len(texts), 4), name="some")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A folder of two adapters, gates of one that lie apart, something broken, a model, and other things."""
    folder = tmp_path_factory.mktemp("pool")
    model = llama()
    random_experts(model, folder, ["ant", "bee"], ["q_proj", "up_proj"], rank={"ant": 4, "bee": 2})
    bank = moerge.load_experts(folder / "ant")
    notes = note_of_prompt(moerge.PromptFormat("Q: {input}"))
    bank.save_gates({"ant": folder / "gates"}, metadata=notes)
    bank.save_gates(metadata=notes)
    moerge.describe(folder / "ant", [], EMBEDDER, instruction="Count [bold] legs.")
    moerge.index_examples(folder / "ant", [{"text": "x"}], EMBEDDER)
    write_adapter(folder / "dora", {"up": (torch.ones(2, 4), torch.ones(4, 2))}, r=2, use_dora=True)
    (folder / "cut").mkdir()
    (folder / "cut" / "adapter_config.json").write_text("{")
    model.save_pretrained(folder / "model")
    (folder / "logs").mkdir()
    (folder / ".git").mkdir()
    (folder / "notes.txt").touch()
    return folder


def test_rows(pool):
    rows = {row.name: row for row in catalogue([pool])}
    assert list(rows) == ["ant", "bee", "cut", "dora", "gates"]
    ant, bee, gates = rows["ant"], rows["bee"], rows["gates"]
    assert (ant.format, ant.base_model, ant.ranks, ant.modules) == ("PEFT", "tiny", [4], 4)
    assert ant.layers == ["q_proj", "up_proj"] and ant.problem is None and bee.ranks == [2]
    assert ant.gates == {"sigmoid-gate": 4, "instruction-embedding": 0} and bee.gates == {"sigmoid-gate": 4}
    assert ant.instruction == "Count [bold] legs." and ant.indices == ["some"] and bee.indices == []
    assert ant.prompts == ["--template 'Q: {input}'"] and bee.prompts == []
    assert ant.size == sum(file.stat().st_size for file in (pool / "ant").iterdir())
    assert (gates.format, gates.made_for, gates.base_model, gates.modules) == (GATES_ONLY, "ant", "tiny", 4)
    assert "use_dora" in rows["dora"].problem and "adapter_config.json is not valid JSON" in rows["cut"].problem


def test_one_adapter_a_model_and_what_is_not_there(pool):
    rows = catalogue([pool / "bee", pool / "model", pool / "logs", pool / "nowhere"])
    assert [row.name for row in rows][:3] == ["bee", "model", "logs"]
    assert rows[0].problem is None and "it is a model (LlamaForCausalLM)" in rows[1].problem
    assert "adapter_config.json is missing" in rows[2].problem and "no local folder" in rows[3].problem


def test_a_folder_that_cannot_be_looked_into(pool, monkeypatch):
    def denied(_folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("moerge_ext.experts.catalogue.os.scandir", denied)
    rows = catalogue([pool, pool / "ant"])
    assert rows[0].problem == "it cannot be looked into (Permission denied)" and rows[1].problem is None


def test_control_characters_of_a_config_do_not_reach_the_terminal(tmp_path, capsys):
    base = "\x1b[2J[red]base"
    write_adapter(tmp_path / "a", {"up": (torch.ones(4, 8), torch.ones(6, 4))}, base_model_name_or_path=base)
    assert cli.main(["list", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "[2J[red]base" in said


def test_other_formats(tmp_path):
    pair = {"layers.0.self_attn.q_proj": (torch.ones(4, 8), torch.ones(8, 4))}
    write_mlx(tmp_path / "mlx", pair)
    (tmp_path / "one").mkdir()
    for file in ("one/a.gguf", "b.gguf", "c.gguf"):
        write_gguf(tmp_path / file, {f"model.{path}": ab for path, ab in pair.items()})
    rows = catalogue([tmp_path])
    assert [(row.name, row.format, row.problem) for row in rows] == [
        ("b", "GGUF", None),
        ("c", "GGUF", None),
        ("mlx", "MLX-LM", None),
        ("one", "GGUF", None),
    ]


def test_files_that_are_not_as_in_their_manifest(pool, tmp_path):
    random_experts(llama(), tmp_path, ["a"], ["q_proj"])
    folder = tmp_path / "a"
    files = {file.name: file for file in folder.iterdir()}
    (folder / MANIFEST_FILE).write_bytes(manifest_of(files))
    assert catalogue([folder])[0].notes == []
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " ")
    (folder / "moerge_gates.safetensors").unlink()
    assert catalogue([folder])[0].notes == [f"not as in {MANIFEST_FILE}: adapter_config.json, moerge_gates.safetensors"]
    for text in ("", "[]", '{"format": "x"}', '{"format": "moerge-manifest", "version": "1", "files": [1]}'):
        (folder / MANIFEST_FILE).write_text(text)
        assert MANIFEST_FILE in catalogue([folder])[0].notes[0]
    row = {"sha256": "0", "size": 1}
    outside = {"format": "moerge-manifest", "version": "1", "files": {"../../etc/passwd": row}}
    (folder / MANIFEST_FILE).write_text(json.dumps(outside))
    assert "not as in" in catalogue([folder])[0].notes[0]


def test_command(pool, capsys):
    assert cli.main(["list", str(pool)]) == 0
    said = capsys.readouterr().out
    assert "ant" in said and "sigmoid-gate (4)" in said and "examples by some" in said and "gates alone for ant" in said
    assert f"{pool / 'dora'}: " in said and "use_dora" in said
    assert cli.main(["list", "--json", str(pool)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if row["problem"] is None] == ["ant", "bee", "gates"]
    assert cli.main(["list", str(pool / "dora"), str(pool / "model")]) == 1
    assert "it is a model" in capsys.readouterr().out
