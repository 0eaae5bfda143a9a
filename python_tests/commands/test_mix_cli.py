"""`moerge mix`, `moerge train-mix`, and what they make in `moerge eval`."""

from __future__ import annotations

import json

import pytest
import torch
from builders import make_tokenizer
from gate_builders import (
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
)

from moerge_ext.commands.main import main

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mix")
    for name in ("seed", "code", "law"):
        model = llama()
        torch.manual_seed(len(name))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.03 * torch.randn_like(p))
        model.save_pretrained(root / name)
        make_tokenizer(root / name)
    make_adapter(model, root / "lora", scale=0.3)
    task = root / "task"
    task.mkdir()
    rows = [{"input": f"copy {c}:", "target": c * 2} for c in "abcdefgh"]
    for split in ("train", "test"):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "meta.json").write_text(json.dumps({"task": "copy", "split": "train", "metric": "exact_match"}))
    return root


def call(root, *words) -> int:
    return main([str(root / word[1:]) if str(word).startswith("@") else str(word) for word in words])


def test_mix_train_and_evaluate(root, capsys):
    assert call(root, "mix", "--models", "@seed", "@code", "@law", "--output", "@mix", "--no-progress") == 0
    out = capsys.readouterr().out
    assert "mixtral, experts seed, code, law, 2 per token" in out and "moerge train-mix" in out
    words = ("train-mix", "@mix", "--data", "@task/train.jsonl", "--output", "@moe", "--steps", "3", "--device", "cpu")
    assert call(root, *words, "--lr", "0.05", "--no-progress") == 0
    assert "loss " in capsys.readouterr().out and (root / "moe" / "config.json").is_file()
    assert call(root, *words, "--lr", "0.05", "--no-progress", "--resume") == 0
    assert "finished before" in capsys.readouterr().out
    evaluated = (
        "eval",
        "--overwrite",
        "--model",
        "@seed",
        "--tasks",
        "@task",
        "--limit",
        "3",
        "--no-progress",
        "--output",
        "@eval",
    )
    mixed = f"model:{root / 'moe'}"
    for _ in range(2):
        assert call(root, *evaluated, "--experts", "@lora", "--methods", f"base,merged,{mixed}", "--cost") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "model:" in out and "merged" in out
    assert "9 stored answers reused" in out
    assert call(root, *evaluated, "--methods", f"base,{mixed}") == 0  # and without experts
    rows = json.loads((root / "eval" / "results.json").read_text())
    assert mixed in json.dumps(rows)


def test_models_with_and_without_a_name(root, capsys):
    words = ("mix", "--models", "@seed", f"own={root / 'code'}", "--no-progress", "--output")
    assert call(root, *words, "@own") == 0
    assert "experts seed, own, 2 per token" in capsys.readouterr().out
    assert call(root, *words, "@none", "--models", f"own={root / 'law'}") == 2
    said = capsys.readouterr().err
    assert said.startswith("moerge mix: --models: ") and "are both called 'own': name them apart, NAME=DIR" in said
    assert call(root, "mix", "--models", "@seed", "@seed", "--output", "@none") == 2
    assert capsys.readouterr().err.startswith("moerge mix: several models are called seed: name them, NAME=DIR")


def test_the_answers_are_the_other_models(root, capsys):
    """The row of a model is what the base's row is where that model is the base."""
    tasks = ("--tasks", "@task", "--no-progress", "--max-new-tokens", "6")
    law = f"model:{root / 'law'}"
    assert call(root, "eval", "--model", "@seed", *tasks, "--methods", f"base,{law}", "--output", "@one") == 0
    assert call(root, "eval", "--model", "@law", *tasks, "--methods", "base", "--output", "@two") == 0

    def answers(folder, run):
        (file,) = (file for file in (root / folder / "answers" / "copy").iterdir() if run in file.name)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line["answer"] for line in lines if "answer" in line]

    assert answers("one", "law") == answers("two", "base") != answers("one", "base")
    assert len(answers("two", "base")) == 8


def test_refused(root, capsys):
    def refused(message, *words):
        assert call(root, *words) == 2
        assert message in capsys.readouterr().err

    out = ("--output", "@none", "--no-progress")
    refused("two models or more are needed", "mix", "--models", "@seed", *out)
    refused("--models takes [NAME=]DIR, got 'a='", "mix", "--models", "a=b", "a=", *out)
    refused("is no mixture of experts", "train-mix", "@seed", "--data", "@task/train.jsonl", *out)
    evaluated = ("eval", "--overwrite", "--model", "@seed", "--tasks", "@task", *out, "--methods")
    refused("--experts is needed for arrow, oracle_dataset", *evaluated, "base,arrow,oracle_dataset")
    refused("expected model:DIR", *evaluated, "model:")
    refused("there is no folder", *evaluated, "model:/not/there")
    refused("is of whole models, not of experts on one: moerge mix, then", *evaluated, "branch_train_mix",
            "--experts", "@lora")  # fmt: skip
    assert not (root / "none").exists()
