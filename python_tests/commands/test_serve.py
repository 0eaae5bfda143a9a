"""`moerge serve`: what it refuses before anything starts, and what it starts."""

from __future__ import annotations

import json
import sys

import builders
import pytest

from moerge_ext.commands import main as cli
from moerge_ext.commands import serve


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    model = builders.tiny_llama()
    model.save_pretrained(root / "model")
    experts = builders.random_experts(model, root / "experts", ["cat", "dog"], ["q_proj", "up_proj"])
    return str(root / "model"), [str(path) for path in experts.values()]


def called(folders, *more: str) -> int:
    model, experts = folders
    return cli.main(["serve", "--model", model, "--experts", *experts, *more])


def test_check_says_that_it_can_be_served(folders, capsys):
    assert called(folders, "--methods", "arrow", "--check") == 0
    assert "2 experts can be served with phatgoose, arrow" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, words",
    [
        (["--top-k", "5"], ["top_k=5 is more than the number of experts, E=2"]),
        (["--method", "average_activation"], ["average-activation"]),
        (["--method", "phatgose", "--methods", "nope"], ["did you mean 'phatgoose'", "unknown method 'nope'"]),
        (["--experts", "missing"], ["missing"]),
        (["--method", "expert:eel"], ["no expert named 'eel'"]),
        (["--live-experts", "-1"], ["spare must be a number of experts, 0 or more, got -1"]),
        (["--live-experts", "1", "--method", "merged"], ["spare=1: method 'merged' routes nothing"]),
        (["--method", "token_level"], ["reads the text again as it grows"]),
    ],
)
def test_experts_that_cannot_be_served_end_with_status_2(folders, capsys, monkeypatch, more, words):
    monkeypatch.setattr(serve.os, "execv", lambda *_: pytest.fail("started"))
    assert called(folders, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("moerge serve: ") and all(word in said for word in words), said


def test_it_becomes_vllm(folders, monkeypatch):
    started = []
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(serve.os, "execv", lambda *words: started.append(words))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    called(folders, "--top-k", "1", "--methods", "arrow", "--", "--port", "8123")
    ((program, words),) = started
    assert program == sys.executable and words[-2:] == ["--port", "8123"] and "serve" in words
    said = json.loads(words[words.index("--additional-config") + 1])
    assert said == {"moerge": {"experts": folders[1], "method": "phatgoose", "top_k": 1, "methods": {"arrow": {}}}}
    assert serve.os.environ["VLLM_PLUGINS"] == "other,moerge"


def test_what_it_answers_besides(folders, monkeypatch):
    """vLLM wants a plugin of routes to be named; all that it loads unnamed are named with it."""
    started = []
    monkeypatch.setattr(serve, "find_spec", lambda name: name == "vllm")
    monkeypatch.setattr(serve.os, "execv", lambda *words: started.append(words[1]))
    monkeypatch.setattr(serve, "installed_plugins", lambda: ["another"])
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.delenv("VLLM_PLUGINS")
    called(folders)
    assert "VLLM_PLUGINS" not in serve.os.environ
    called(folders, "--live-experts", "2", "--routing-metrics", "--traces", "8")
    said = json.loads(started[1][started[1].index("--additional-config") + 1])["moerge"]
    assert (said["spare"], said["metrics"], said["traces"]) == (2, True, 8)
    assert serve.os.environ["VLLM_PLUGINS"] == "another,moerge"
    assert "spare" not in started[0][started[0].index("--additional-config") + 1]


def test_it_needs_vllm_and_its_own_config(folders, capsys, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert called(folders) == 2 and "pip install vllm" in capsys.readouterr().err
    monkeypatch.setattr(serve, "find_spec", lambda name: True)
    assert called(folders, "--", "--additional-config={}") == 2
    assert "--additional-config is what this command makes" in capsys.readouterr().err
