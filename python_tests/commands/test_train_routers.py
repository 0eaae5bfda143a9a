"""`moerge train-routers`, and the commands that take what it wrote."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer
from gate_builders import (
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
)
from query_cases import fake_embedder

import moerge_ext as moerge
from moerge_ext.commands.main import main
from moerge_ext.experts.routers import ROUTERS_FILE, read_routers

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train_routers")
    model = llama()
    model.save_pretrained(root / "model")
    make_tokenizer(root / "model")
    for i, name in enumerate("ab"):
        make_adapter(model, root / name, scale=0.3 + 0.1 * i)
        moerge.describe(root / name, [], fake_embedder(), instruction=f"copy {name}")
    task = root / "task"
    task.mkdir()
    rows = [{"input": f"copy {c}:", "target": c * 2} for c in "abcdefgh"]
    for split in ("train", "test"):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "meta.json").write_text(json.dumps({"task": "copy", "split": "train", "metric": "exact_match"}))
    return root


def call(root, *words) -> int:
    return main([str(root / word[1:]) if str(word).startswith("@") else str(word) for word in words])


COMMON = ("@model", "--experts", "@a", "@b", "--device", "cpu", "--no-progress", "--steps", "2", "--batch-size", "4")
OWN = ("--expert-data", "a={0}/task/train.jsonl", "--expert-data", "b={0}/task/test.jsonl")
DATA = ("--data", "@task/train.jsonl")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("lora_flow", DATA),
        ("mole", (*DATA, "--validation", "@task/test.jsonl", "--balance", "0.1", "--option", "per=layer")),
        ("meteora", (*DATA, "--z", "0.01", "--train-experts")),
        ("adapter_fusion", DATA),
        ("mixda", DATA),
        ("we_moe", DATA),
        ("pwe_moe", OWN),
        ("pemt", (*DATA, "--option", "description=copy a letter", "--sparsity", "0.2")),
        ("co_llm", (*DATA, "--validation", "@task/test.jsonl", "--option", "init_steps=2")),
        ("pi_tuning", (*DATA, *OWN, "--option", "target=a", "--option", "nearest=1")),
    ],
)
def test_train_evaluate_and_generate(root, method, more, capsys):
    more = [word.format(root) for word in more]
    assert call(root, "train-routers", *COMMON, "--method", method, "--output", f"@out-{method}", *more) == 0
    out = capsys.readouterr().out
    assert "2 steps of up to 4" in out and f"--methods {method} --routers" in out
    file = root / f"out-{method}" / ROUTERS_FILE
    assert read_routers(file).method == method
    model = ("--model", "@model", "--experts", "@a", "@b")
    evaluated = (
        "eval",
        "--overwrite",
        *model,
        "--tasks",
        "@task",
        "--limit",
        "2",
        "--no-progress",
        "--output",
        f"@eval-{method}",
    )
    assert call(root, *evaluated, "--methods", f"{method},base", "--routers", file) == 0
    out = capsys.readouterr().out
    assert method in out and "stored answers reused" not in out
    assert call(root, *evaluated, "--methods", method, "--routers", file.parent) == 0
    assert "2 stored answers reused" in capsys.readouterr().out
    assert call(root, *evaluated, "--methods", method) == 2
    assert f"{method} needs --routers FILE" in capsys.readouterr().err
    generated = ("generate", "copy a:", *model, "--method", method, "--max-new-tokens", "2", "--trace")
    assert call(root, *generated, "--routers", file) == 0
    said = "tokens written by:" if method == "co_llm" else "share of the routing weight"
    assert said in capsys.readouterr().out


def test_other_routers_give_other_answers(root, capsys):
    """The stored answers of one file are not those of another."""
    for seed in ("1", "2"):
        out = ("--output", f"@seed{seed}", "--seed", seed, "--lr", "0.1")
        assert call(root, "train-routers", *COMMON, "--method", "lora_flow", *DATA, *out) == 0
    capsys.readouterr()
    words = (
        "eval",
        "--overwrite",
        "--model",
        "@model",
        "--experts",
        "@a",
        "@b",
        "--tasks",
        "@task",
        "--limit",
        "2",
        "--no-progress",
    )
    for seed in ("1", "2"):
        words_of = (*words, "--output", "@seeds", "--methods", "lora_flow", "--routers", f"@seed{seed}")
        assert call(root, *words_of) == 0
        assert "reused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "mole", *DATA, "--option", "reads=x"), "reads must be"),
        (("--method", "mole"), "pass --data"),
        (("--method", "pwe_moe", *DATA), "pass --expert-data NAME=FILE, and no --data"),
        (("--method", "mole", *DATA, "--option", "routers=x"), "this command makes them"),
        (("--method", "mole", *DATA, "--expert-data", "a"), "--expert-data takes NAME=FILE"),
        (("--method", "mole", *DATA, "--dropout", "1.5"), "dropout must be in"),
        (("--method", "pemt", *DATA), 'it needs:\n- --option description="...", a sentence of what the task asks for'),
        (("--method", "co_llm", *DATA, "--balance", "1"), "one gate, without balance"),
    ],
)
def test_wrong_use(root, words, said, capsys):
    assert call(root, "train-routers", *COMMON, "--output", "@bad", *words) == 2
    assert said in capsys.readouterr().err
    assert not (root / "bad" / ROUTERS_FILE).exists()


def test_co_llm_answers_many_prompts_and_is_refused_where_layers_are_asked(root, capsys):
    assert call(root, "train-routers", *COMMON, "--method", "co_llm", *DATA, "--output", "@co", "--option",
                "init_steps=0") == 0  # fmt: skip
    words = ("--model", "@model", "--experts", "@a", "@b", "--routers", "@co")
    (root / "prompts.txt").write_text("copy a:\ncopy b:\ncopy c:\n")
    asked = ("generate", *words, "--method", "co_llm", "--prompts", "@prompts.txt", "--json", "--trace")
    capsys.readouterr()
    assert call(root, *asked, "--max-new-tokens", "3", "--batch-size", "2", "--option", "threshold=0") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert all(line["experts"]["base"] == 0 and sum(line["experts"].values()) == pytest.approx(1) for line in lines)
    rows = ("co_llm/threshold=0", "co_llm/threshold=1", "base")
    assert call(root, "eval", *words, "--tasks", "@task", "--methods", ",".join(rows), "--no-progress", "--cost",
                "--shares", "--output", "@co-eval") == 0  # fmt: skip
    answers, passes = {}, {}
    for file in (root / "co-eval" / "answers" / "copy").glob("*.jsonl"):
        settings, *items = map(json.loads, file.read_text().splitlines())
        answers[settings["settings"]["run"]] = [item["answer"] for item in items]
        passes[settings["settings"]["run"]] = sum(item["cost"]["passes"] for item in items)
    assert answers[rows[1]] == answers["base"] != answers[rows[0]] and passes[rows[1]] == 3 * passes["base"]
    capsys.readouterr()
    for command in (
        ("inspect", "--overwrite", *words, "--tasks", "@task", "--methods", "co_llm", "--output", "@i"),
        ("explain", "@model", "x", *words[2:], "--method", "co_llm"),
        ("generate", "x", *words, "--method", "co_llm", "--sample"),
        ("eval", "--overwrite", *words, "--tasks", "@task", "--methods", "co_llm/threshold=2"),
    ):
        assert call(root, *command) == 2, command
        said = capsys.readouterr().err
        assert "co_llm" in said and "Traceback" not in said


def test_a_file_of_another_method(root, capsys):
    words = ("--model", "@model", "--experts", "@a", "@b", "--tasks", "@task", "--no-progress", "--output", "@e")
    assert call(root, "train-routers", *COMMON, "--method", "meteora", *DATA, "--output", "@m") == 0
    assert call(root, "eval", *words, "--methods", "arrow", "--routers", "@m") == 2
    assert "for method meteora, which is not asked for" in capsys.readouterr().err
    assert call(root, "eval", *words, "--methods", "meteora", "--routers", "@m", f"@m/{ROUTERS_FILE}") == 2
    assert "two files are for method 'meteora'" in capsys.readouterr().err
    assert call(root, "generate", "x", *words[:5], "--method", "mole", "--routers", "@m") == 2
    assert "which `moerge train-routers --method mole` writes, got one of meteora" in capsys.readouterr().err
