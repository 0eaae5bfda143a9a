"""`moerge serve`: what it refuses before anything starts, and what it starts."""

from __future__ import annotations

import json
import socket
import sys
from importlib.util import find_spec

import builders
import pytest
from safetensors.torch import load_file, save_file

from moerge_ext.commands import main as cli
from moerge_ext.commands import serve
from moerge_ext.serving.transformers import launch

SERVER = pytest.mark.skipif(
    find_spec("transformers.cli.serving") is None, reason="needs the server of a newer transformers (the extra `serve`)"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("serve")
    model = builders.tiny_llama()
    model.save_pretrained(root / "model")
    experts = builders.random_experts(model, root / "experts", ["cat", "dog"], ["q_proj", "up_proj"])
    return str(root / "model"), [str(path) for path in experts.values()]


def called(folders, *more: str, engine: str = "vllm") -> int:
    model, experts = folders
    return cli.main(["serve", "--engine", engine, "--model", model, "--experts", *experts, *more])


def test_check_says_that_it_can_be_served(folders, capsys, monkeypatch):
    assert called(folders, "--methods", "arrow", "--check") == 0
    out = capsys.readouterr().out
    assert "2 experts can be served with phatgoose, arrow by vllm" in out
    assert ("not here yet: --engine vllm needs vLLM" in out) == (find_spec("vllm") is None)
    assert called(folders, "--method", "merged", "--check", engine="transformers") == 0
    assert "2 experts can be served with merged by transformers" in capsys.readouterr().out
    monkeypatch.setattr("moerge_ext.serving.transformers.launch._is_there", lambda name: name != "uvicorn")
    assert called(folders, "--method", "merged", "--check", engine="transformers") == 0
    assert (
        "not here yet: transformers' server needs uvicorn: pip install 'moerge_ext[serve]'" in capsys.readouterr().out
    )


@pytest.mark.parametrize("there, engine", [(True, "vllm"), (False, "transformers")])
def test_the_engine_is_vllm_where_it_is_installed(folders, capsys, monkeypatch, there, engine):
    monkeypatch.setattr(serve, "find_spec", lambda name: there or None)
    model, experts = folders
    assert cli.main(["serve", "--model", model, "--experts", *experts, "--check"]) == 0
    assert f"by {engine}" in capsys.readouterr().out


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
        (["--method", "nope"], ["moerge serve: the experts cannot be served:\n", "unknown method 'nope'"]),
    ],
)
def test_experts_that_cannot_be_served_end_with_status_2(folders, capsys, monkeypatch, more, words):
    monkeypatch.setattr(serve.os, "execv", lambda *_: pytest.fail("started"))
    assert called(folders, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith("moerge serve: ") and all(word in said for word in words), said


ALONE = "needs weights or affinities of each request, which transformers' server does not let through"


@pytest.mark.parametrize(
    "more, words",
    [
        (["--top-k", "5"], ["top_k=5 is more than the number of experts, E=2"]),
        (["--method", "average_activation"], ["average-activation"]),
        (["--experts", "missing"], ["missing"]),
        (["--method", "expert:eel"], ["no expert named 'eel'"]),
        *((["--method", name], [f"method '{name}' {ALONE}", "--engine vllm"]) for name in ("given", "glider")),
        (["--method", "retrieval"], [f"method 'retrieval' {ALONE}"]),
        (["--method", "token_level"], [f"method 'token_level' {ALONE}"]),
        (["--method", "co_llm"], ["decodes with several models"]),
        (
            ["--methods", "arrow", "--live-experts", "1", "--routing-metrics", "--traces", "2"],
            ["--methods: ", "--live-experts: ", "--routing-metrics: ", "--traces: ", "`--engine vllm` has it"],
        ),
        (["--model", "a@b"], ["'a@b': transformers' server takes what follows an @ for a revision"]),
        (["--model", "a.gguf"], ["'a.gguf' is a GGUF file"]),
        pytest.param(["--", "--prt", "1"], ["transformers serve: No such option: --prt"], marks=SERVER),
        pytest.param(["--check", "--", "--prt", "1"], ["transformers serve: No such option: --prt"], marks=SERVER),
        pytest.param(["--check", "--", "--port", "99999"], ["--port must be 0 to 65535, got 99999"], marks=SERVER),
        pytest.param(["--", "other"], ["transformers serve: Got unexpected extra argument"], marks=SERVER),
    ],
)
def test_what_transformers_server_cannot_serve_ends_with_status_2(folders, capsys, monkeypatch, more, words):
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("started"))
    monkeypatch.setattr(launch, "require", lambda: None)
    assert called(folders, *more, engine="transformers") == 2
    said = capsys.readouterr().err
    assert said.startswith("moerge serve: ") and all(word in said for word in words), said


@SERVER
def test_the_options_of_transformers_server_are_shown(folders, capsys, monkeypatch):
    monkeypatch.setattr(launch, "require", lambda: None)
    with pytest.raises(SystemExit) as ended:
        called(folders, "--", "--help", engine="transformers")
    assert ended.value.code == 0 and "Usage: moerge serve ... -- [OPTIONS]" in capsys.readouterr().out


def test_options_of_the_server_without_dashes_before_them(folders, capsys):
    with pytest.raises(SystemExit):
        called(folders, "--port", "8123")
    assert "as the last ones: moerge serve --model DIR --experts DIR DIR -- --port 8123" in capsys.readouterr().err
    assert called(folders, "--check", "--", "--additional-config", "{}") == 2


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
@pytest.mark.parametrize("brings", ["a head", "a start"])
def test_experts_that_bring_something_of_the_base(folders, tmp_path, capsys, engine, brings):
    """Known without the weights of the model; one that is not used by the method is no matter."""
    own = tmp_path / "own"
    builders.random_experts(builders.tiny_llama(), tmp_path, ["own"], ["q_proj"])
    if brings == "a head":
        weights = load_file(own / "adapter_model.safetensors")
        weights["base_model.model.lm_head.weight"] = builders.tiny_llama().lm_head.weight.detach().clone()
        save_file(weights, own / "adapter_model.safetensors")
        words = "expert 'own' brings parameters of the base, lm_head.weight, which a server does not exchange"
    else:
        config = json.loads((own / "adapter_config.json").read_text())
        (own / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
        words = "expert 'own' began its LoRA with pissa"
    more = ("--experts", str(own), "--check", "--method")
    assert called(folders, *more, "arrow", engine=engine) == 2
    said = capsys.readouterr().err
    assert words in said and "meta device" not in said and said.count("expert 'own'") == 1, said
    assert called(folders, *more, "expert:own", engine=engine) == 2
    assert called(folders, *more, "expert:cat", engine=engine) == 0
    assert called(folders, *more, "arrow", "--names", "cat", "dog", engine=engine) == 0


def test_transformers_server_answers_with_decoders(tmp_path, capsys):
    model = builders.tiny_t5()
    model.save_pretrained(tmp_path / "model")
    experts = builders.random_experts(model, tmp_path / "experts", ["cat", "dog"], ["q"])
    paths = str(tmp_path / "model"), [str(path) for path in experts.values()]
    assert called(paths, "--check", engine="transformers") == 2
    assert "t5 is an encoder-decoder" in capsys.readouterr().err


def test_transformers_server_needs_its_packages(folders, capsys, monkeypatch):
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "uvicorn" else True)
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("started"))
    assert called(folders, engine="transformers") == 2
    assert "needs uvicorn: pip install 'moerge_ext[serve]'" in capsys.readouterr().err


@SERVER
def test_it_says_that_nothing_can_listen_before_the_model_is_read(folders, capsys, monkeypatch):
    monkeypatch.setattr(launch, "require", lambda: None)
    monkeypatch.setattr(launch, "route", lambda *_: pytest.fail("the model was read"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert called(folders, "--", "--host", "127.0.0.1", "--port", port, engine="transformers") == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


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
