"""`moerge explain`, and the options of `moerge inspect` that are about pictures."""

from __future__ import annotations

import argparse
import json

import builders
import patch_cases as cases
import pytest
from builders import make_tokenizer
from query_cases import fake_embedder

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.commands import options
from moerge_ext.commands.explain import numbers


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command's arguments up to its options."""
    root = tmp_path_factory.mktemp("explain")
    model = cases.build("llama")
    model.save_pretrained(root / "model")
    make_tokenizer(root / "model")
    folders = builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER)
    for name, folder in folders.items():
        moerge.index_examples(folder, [{"input": f"{name} {i}"} for i in range(3)], fake_embedder())
    return ["explain", str(root / "model"), "ab: [red]", "--experts", *map(str, folders.values())]


def test_text_json_and_page(words, tmp_path, capsys):
    page = tmp_path / "new" / "page.html"
    assert cli.main([*words, "--max-new-tokens", "3", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "layer 0:" in out and "layer 1:" in out and f"wrote {page} (" in out and "│" in out
    assert page.read_text().startswith("<!doctype html>")
    assert cli.main([*words, "--json", "--module", "q_proj", "--layers", "1", "--html", str(page)]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["streams"][0]["depths"] == ["1"] and "wrote" in captured.err
    assert all(sum(t["weights"]["1"].values()) == pytest.approx(1, abs=1e-5) for t in told["streams"][0]["tokens"])


def test_a_prompt_that_experts_has_taken(words, capsys):
    _, model, prompt, *experts = words
    with pytest.raises(SystemExit):
        cli.main(["explain", "--model", model, *experts, prompt])
    said = capsys.readouterr().err
    assert "required: PROMPT; put PROMPT first, or after another option than --experts, which takes" in said
    with pytest.raises(SystemExit):
        cli.main(["explain", "--model", model])
    assert "--experts, which" not in capsys.readouterr().err


def test_a_method_that_routes_by_the_sequence_says_so(words, capsys, monkeypatch):
    monkeypatch.setattr(options, "build_embedder", lambda *_: fake_embedder())
    for method, new in (("retrieval", "0"), ("token_level", "3")):
        assert cli.main([*words, "--method", method, "--embedder", "bag", "--max-new-tokens", new]) == 0
        out = capsys.readouterr().out
        assert "the same for all tokens" in out
        assert ("were not read" in out) == (method == "token_level")


def test_refusals(words, tmp_path, capsys):
    for more, text in (
        (["--html", str(tmp_path)], "is a folder"),
        (["--html", "/proc/none/page.html"], "/proc/none"),
        (["--bands", "0"], "--bands must be at least 1, got 0"),
        (["--max-new-tokens", "-2"], "--max-new-tokens must be at least 0, got -2"),
        (["--method", "merged"], "'merged' routes nothing"),
        (["--method", "expert:ant"], "routes nothing"),
        (["--method", "given"], "takes weights from you"),
        (["--module", "nothing"], "no routed module is called nothing"),
        (["--layers", "2-5"], "there is no layer 2, 3, 4"),
        (
            ["--max-new-tokens", "500"],
            "the prompt has 9 tokens, and with 500 to generate they do not fit the model's context of 128",
        ),
    ):
        assert cli.main([*words, *more]) == 2, more
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*words, "--layers", "3-1"])
    assert "expected layers such as 0-9,29, got '3-1'" in capsys.readouterr().err
    assert numbers("0-2, 7") == {0, 1, 2, 7}
    for wrong in ("", "a", "1-", "-1", "1-2-3", "0-999999999"):
        with pytest.raises(argparse.ArgumentTypeError):
            numbers(wrong)


def test_inspect_page_and_views(words, tmp_path, capsys):
    pytest.importorskip("plotly")
    task, page = tmp_path / "bee", tmp_path / "page.html"
    task.mkdir()
    (task / "test.jsonl").write_text(json.dumps({"input": "ab", "target": "c"}) + "\n")
    (task / "meta.json").write_text(json.dumps({"task": "bee", "metric": "exact_match"}))
    same = [
        "inspect",
        "--overwrite",
        "--model",
        words[1],
        *words[3:],
        "--tasks",
        str(task),
        "--limit",
        "1",
        "--no-progress",
    ]
    out = ["--output", str(tmp_path / "out"), "--view", "both", "--html", str(page)]
    assert cli.main([*same, *out]) == 0
    size = page.stat().st_size / 1e6  # plotly's own script is nearly all of it
    assert f"{page} ({size:.1f} MB)" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "asked.inspect.json",
        "composition.md",
        "inspect.json",
        "modules-phatgoose.png",
        "routing-phatgoose.png",
    ]
    assert cli.main([*same, "--html", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
