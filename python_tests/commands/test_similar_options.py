"""Which solved examples a writer sees, from the shell: `moerge generate`, `inspect` and `eval` with a chat server."""

from __future__ import annotations

import json

import patch_cases as cases
import pytest
from builders import make_tokenizer
from query_cases import WORDS, completion, server

from moerge_ext.commands import main as cli


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base, three described experts, an embedder, a task and solved examples in `tmp_path`."""
    monkeypatch.setenv("MOERGE_CACHE", str(tmp_path / "cache"))
    model = cases.build("llama")
    model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    cases.build("bert").save_pretrained(tmp_path / "bert")
    make_tokenizer(tmp_path / "bert")
    folders = cases.builders.random_experts(model, tmp_path / "experts", cases.NAMES, cases.DECODER)
    rows = [{"input": f"solved {i}", "target": "yes"} for i in "abcd"]
    (tmp_path / "solved.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        rows = [{"input": f"{split} {i}", "target": "yes"} for i in "abcd"]
        (tmp_path / "task" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, folder in folders.items():
        described = ["describe", "--adapter", folder, "--instruction", f"please do {WORDS[name]}"]
        assert call(*described, "--embedder", tmp_path / "bert", "--mean-pool") == 0
    return tmp_path


def call(*words):
    return cli.main([str(word) for word in words])


def common(place):
    experts = sorted((place / "experts").iterdir())
    return ["--model", place / "base", "--experts", *experts, "--embedder", place / "bert", "--mean-pool"]


def prompts(seen):
    return [request["messages"][0]["content"] for request in seen]


def test_generate_shows_solved_or_indexed_examples(place, capsys):
    words = [
        "generate",
        "abc",
        *common(place),
        "--method",
        "glider",
        "--option",
        "threshold=0.5",
        "--max-new-tokens",
        "1",
    ]
    with server(completion("Please do it well.")) as (url, seen):
        words += ["--writer", "m", "--writer-url", url]
        assert call(*words) == 0
        assert "pairs" not in prompts(seen)[-1]
        assert call(*words, "--similar", "2") == 2
        assert "--similar 2: there are no solved examples; pass --solved FILE, or" in capsys.readouterr().err
        assert call(*words, "--solved", place / "solved.jsonl") == 0
        assert "are three pairs" in prompts(seen)[-1] and prompts(seen)[-1].count("- Input: solved ") == 3
        index = [
            "describe",
            "--adapter",
            place / "experts" / "ant",
            "--examples",
            place / "solved.jsonl",
            "--index",
            "4",
        ]
        assert call(*index, "--index-texts", "--embedder", place / "bert", "--mean-pool") == 0
        (place / "own.txt").write_text("{count}: {examples}")
        assert call(*words, "--similar", "2", "--writer-template", place / "own.txt") == 0
        assert prompts(seen)[-1].startswith("two: - Input: solved ") and prompts(seen)[-1].count("- Output: yes") == 2
        assert call(*words, "--similar", "0", "--writer-template", place / "own.txt") == 0
        assert prompts(seen)[-1] == "no: - Input: abc"


def test_inspect_and_eval_take_the_tasks_own(place):
    words = [
        *common(place),
        "--tasks",
        place / "task",
        "--limit",
        "1",
        "--no-progress",
        "--methods",
        "glider/threshold=0.5",
    ]
    with server(completion("Please do it well.")) as (url, seen):
        words += ["--writer", "m", "--writer-url", url, "--similar", "3"]
        assert call("inspect", "--overwrite", *words, "--output", place / "inspect") == 0
        assert prompts(seen)[-1].count("- Input: train ") == 3 and prompts(seen)[-1].endswith("- Input: test a")
        rows = json.loads((place / "inspect" / "inspect.json").read_text())["rows"]
        assert rows[0]["method"] == "glider/threshold=0.5 (few-shot)"
        assert call("eval", "--overwrite", *words, "--solved", place / "solved.jsonl", "--output", place / "eval") == 0
        assert prompts(seen)[-1].count("- Input: solved ") == 3


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--similar", "3"], "--similar and --solved are for --writer MODEL"),
        (["--writer", "m", "--similar", "-1"], "--similar must be at least 0, got -1"),
        (
            ["--writer", "m", "--similar", "0", "--solved", "f"],
            "--similar 0 shows the writer nothing: leave --solved out",
        ),
        (["--writer-template", "f"], "--writer-template is what --writer MODEL is asked"),
    ],
)
def test_what_does_not_go_together_is_said(words, text, capsys):
    assert (
        call("generate", "abc", "--model", "m", "--experts", "e", "--method", "glider", "--embedder", "b", *words) == 2
    )
    assert text in capsys.readouterr().err
