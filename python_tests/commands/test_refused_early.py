"""What a command needs only at its end is refused at its beginning."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import llama

from moerge_ext.commands import main as cli


@pytest.fixture
def folder(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    random_experts(model, tmp_path, ["expert"], ["q_proj"])
    (tmp_path / "task").mkdir()
    rows = [{"input": f"{c}:", "target": c} for c in "abcdef"]
    (tmp_path / "task" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    entries = [{"name": name, "template": {"question": name + " {input}"}} for name in ("one", "two")]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    (tmp_path / "file").touch()
    return tmp_path


def no_model(*_args, **_kwargs):
    pytest.fail("the model was read")


def router(folder, *more):
    words = ["train-router", "--model", folder / "model", "--prompts", folder / "prompts.json", "--no-progress"]
    words += ["--data", folder / "task" / "test.jsonl", "--router", folder / "model", "--output", folder / "router"]
    return cli.main([*map(str, [*words, "--max-new-tokens", 2, "--nobody-right", "drop", *more])])


def test_outputs_that_cannot_be_written(folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    shared = ["--model", folder / "model", "--output", folder / "file"]
    tasks = ["--experts", folder / "expert", "--tasks", folder / "task", "--methods", "phatgoose"]
    questions = ["--prompts", folder / "prompts.json", "--data", folder / "task" / "test.jsonl", "--router", "none"]
    data = ["--data", folder / "task" / "test.jsonl", "--output", folder / "file"]
    for words in (
        ["eval", *shared, *tasks],
        ["inspect", *shared, *tasks],
        ["ensemble", *shared, *questions],
        ["train-router", *shared, *questions[:-1], folder / "model"],
        ["train-expert", folder / "model", *data],
        ["train-gates", folder / "model", folder / "expert", *data],
        ["describe", "--adapter", folder / "expert", "--instruction", "x", "--embedder", "none", *data[2:]],
    ):
        assert cli.main([*map(str, words)]) == 2, words
        assert f"'{folder / 'file'}'" in capsys.readouterr().err, words
    assert (folder / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "train-expert model --output out --lr nan --seed 99999999999999999999",
            "--lr must be positive and finite, got",
        ),
        ("train-expert model --output out --alpha 0", "--alpha must be positive and finite, got 0"),
        ("train-expert model --output out --warmup-ratio 2", "--warmup-ratio must be in [0, 1], got 2"),
        (
            "train-gates model expert --output out --seed -99999999999999999999",
            "--seed must be a number of 64 bits, got",
        ),
        ("train-expert model --output out --target-modules [", "must be names or a regular expression, got '['"),
        ("train-expert model --output model", "model is the folder of a model (config.json and its weights), which"),
        ("new-expert model --output model", "model is the folder of a model"),
        ("train-expert model --output file/out", "'file' is a file, in which file/out cannot lie: name a folder"),
        (
            "eval --model model --experts expert --methods arrow --tasks task task",
            "distinct names; several are called task",
        ),
        ("eval --model model --experts expert --methods model:nosuch --tasks task", "no local folder 'nosuch'"),
        (
            "eval --model model --experts expert --methods pelmo:nosuch --tasks task",
            "pelmo:nosuch: there is no file nosuch",
        ),
        ("eval --model model --experts expert --methods arrow --tasks task --max-new-tokens 9999", "context of"),
        ("inspect --model model --experts expert --methods arrow --tasks long", "more than the context of"),
        ("generate hi --model model --experts expert --method arrow --instruction x", "pass such a --template too"),
        (
            "generate hi --model model --experts expert --method arrow --writer-timeout nan",
            "must be positive and finite",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused_before_weights_are_read(folder, capsys, monkeypatch, words, said):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    monkeypatch.chdir(folder)
    (folder / "long").mkdir()
    (folder / "long" / "test.jsonl").write_text(json.dumps({"input": "ab" * 9999, "target": "c"}))
    more = ["--data", "task/test.jsonl"] if words.startswith("train") else []
    assert cli.main([*words.split(), *more]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "model" / "adapter_config.json").exists()


def test_an_empty_word_is_no_folder(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train-expert", "model", "--data", "task/test.jsonl", "--output", ""])
    assert caught.value.code == 2 and "argument --output: expected a path, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--nobody-right", "similar"], "pass --embedder MODEL and --theta X"),
        (["--judge", "llm"], "--judge llm needs --judge-model"),
        (["--judge", "exact", "x=numeric"], "for the datasets task; got exact x=numeric"),
        (["--theta", "0.5", "--embedder", "x"], "--theta is for --nobody-right similar"),
        (["--theta", "2", "--embedder", "x"], "--theta is a cosine and must be in [-1, 1], got 2"),
        (["--judge", "numeric"], "row 0 (from 0): the numeric judge needs a number in the gold answer, got 'a'"),
        (["--epochs", "0", "--lr", "0"], "--epochs must be at least 1, got 0; --lr must be in (0, 1), got 0.0"),
        (["--router", "prompts.json"], "'prompts.json' is a file: pass the folder of a model"),
        (["--template", "{oops}"], "the template asks for {oops}"),
    ],
)
def test_a_router_that_cannot_be_trained(folder, capsys, monkeypatch, more, said):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(folder)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    assert router(folder, *more) == 2
    assert said in capsys.readouterr().err and not (folder / "router").exists()


def test_the_embedder_of_theta_is_loaded_before_any_answer(folder, capsys, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    more = ["--nobody-right", "similar", "--theta", 0.5, "--mean-pool"]
    assert router(folder, *more, "--embedder", folder / "task", "--embedder-name", "x") == 2
    assert "task" in capsys.readouterr().err


def test_answers_are_kept_where_nobody_is_right(folder, capsys):
    pytest.importorskip("accelerate")
    assert router(folder) == 2
    assert f"none is left; the answers are kept in {folder / 'router'}" in capsys.readouterr().err
    assert len(list((folder / "router" / "answers").glob("*.jsonl"))) == 2


@pytest.mark.parametrize(
    ("adapter", "more", "said"),
    [
        ("task", ["--instruction", "x"], "adapter_config.json is missing"),
        (
            "expert",
            ["--examples", "task/test.jsonl", "--writer", "none", "--count", "99"],
            "expected at least 99 examples",
        ),
    ],
)
def test_describe_looks_at_adapter_and_rows_first(folder, capsys, monkeypatch, adapter, more, said):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("moerge_ext.commands.describe.build_embedder", lambda *_: pytest.fail("a model was read"))
    assert cli.main(["describe", "--adapter", adapter, "--embedder", "none", *more]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods", "base,arrow"], "base: this model routes nothing in its layers that could be shown"),
        (["--methods", "merged,expert:expert,arrow,mole"], "merged, expert:expert, mole: this model routes nothing"),
        (["--methods", "arrow/top_k=1", "--oracle", "task=nobody"], "there is no nobody among expert"),
        (["--methods", "arrow/top_k=1", "--oracle", "expert=other"], "there is no other among expert"),
    ],
)
def test_inspections_of_what_cannot_be_shown(folder, capsys, monkeypatch, more, said):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    words = ["inspect", "--model", folder / "model", "--experts", folder / "expert", "--tasks", folder / "task"]
    assert cli.main([*map(str, [*words, "--output", folder / "seen", *more])]) == 2
    assert said in capsys.readouterr().err and not (folder / "seen").exists()


def test_an_oracle_by_the_name_of_its_task_is_not_replaced(folder, capsys):
    words = ["inspect", "--model", folder / "model", "--tasks", folder / "expert-task" / "expert", "--no-progress"]
    (folder / "expert-task").mkdir()
    (folder / "task").rename(folder / "expert-task" / "expert")
    random_experts(llama(), folder, ["other"], ["q_proj"], seed=1)
    words += [
        "--experts",
        folder / "expert",
        folder / "other",
        "--methods",
        "arrow/top_k=1",
        "--output",
        folder / "seen",
    ]
    assert cli.main([*map(str, words)]) == 0
    assert cli.main([*map(str, [*words, "--oracle", "expert=other"])]) == 2
    assert "with other oracles (of expert expert there, other here): pass --overwrite" in capsys.readouterr().err
    assert cli.main([*map(str, [*words, "--oracle", "expert=other", "--overwrite"])]) == 0
