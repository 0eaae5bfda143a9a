"""A hub that cannot be reached is said in seconds, and one that is slow is asked all the same."""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub
import pytest
import torch
from builders import make_tokenizer, write_adapter

from moerge_ext.experts.bank import load_experts
from moerge_ext.files import hub
from moerge_ext.models.pretrained import load_config, load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SLOW = 0.7  # seconds before an answer: longer than the probe waits, shorter than the client


class SlowHub(BaseHTTPRequestHandler):
    """What the client asks of a repository user/repo, whose files lie in `folder`."""

    folder = None
    status = 200

    def log_message(self, *_args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        time.sleep(SLOW)
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" in self.path:
            body = (self.folder / name).read_bytes() if (self.folder / name).is_file() else None
        elif "/tree/" in self.path:
            files = [(file.name, file.stat().st_size) for file in self.folder.iterdir()]
            body = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
        else:
            body = {"id": "user/repo", "sha": COMMIT, "siblings": [], "tags": [], "private": False, "gated": False}
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(404 if body is None else self.status)
        for header, value in (("ETag", f'"{name}"'), ("X-Repo-Commit", COMMIT), ("Content-Length", len(raw))):
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)


@pytest.fixture
def endpoint(monkeypatch, tmp_path):
    """(port, patience) -> the hub of the client, its cache empty, and nothing known of it."""
    constants = huggingface_hub.constants

    def at(port: int, patience: float = 1):
        address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr(hub, "_known", {})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", patience)

    return at


@pytest.fixture
def slow(endpoint, monkeypatch, tmp_path):
    """A hub that takes its time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowHub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(SlowHub, "folder", tmp_path / "repository")
    endpoint(server.server_port)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def nobody(endpoint):
    """A port at which nobody listens."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint(taken.getsockname()[1])
        yield


def test_a_slow_hub_is_asked(slow, tmp_path):
    write_adapter(tmp_path / "repository", {"layers.0.q_proj": (torch.ones(2, 8), torch.ones(4, 2))}, r=2)
    assert hub.unreached() is None
    assert load_experts("user/repo").names == ("repo",)


def test_any_answer_is_an_answer(slow, monkeypatch):
    monkeypatch.setattr(SlowHub, "status", 503)
    assert hub.unreached() is None and hub.only_cached() == {}


def test_nobody_there_is_said_at_once(nobody):
    began = time.monotonic()
    for load, what in ((load_tokenizer, "model"), (load_config, "model"), (load_experts, "adapter")):
        with pytest.raises(ValueError) as caught:
            load("user/repo")
        assert f"has no such {what}, and the hub http://127.0.0.1:" in str(caught.value)
        assert "cannot be reached (ConnectError: " in str(caught.value)
        assert "pass a folder" in str(caught.value) and "HF_HUB_OFFLINE=1" in str(caught.value)
    assert time.monotonic() - began < 20  # the client alone: 23 s for every file


def test_it_is_asked_once(nobody, monkeypatch):
    assert hub.unreached() is not None
    monkeypatch.setattr(hub, "_asked", lambda *_: pytest.fail("asked again"))
    assert hub.unreached() is not None
    monkeypatch.setattr(hub, "KEPT", 0.0)
    monkeypatch.setattr(hub, "_asked", lambda *_: None)
    assert hub.unreached() is None, "a network that is back is seen"


def test_a_name_server_that_does_not_answer(endpoint, monkeypatch):
    endpoint(1, patience=0.1)
    monkeypatch.setattr(hub, "_refused", lambda *_: time.sleep(5))
    assert hub.unreached() == "nobody has answered for 0.3 s; HF_HUB_ETAG_TIMEOUT is a third of it"


def test_offline_nobody_is_asked(nobody, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_asked", lambda *_: pytest.fail("asked"))
    assert hub.only_cached() == {}
    with pytest.raises(ValueError, match="has no such adapter, and HF_HUB_OFFLINE is set"):
        load_experts("user/repo")


def test_what_is_cached_is_used_without_a_network(nobody, tmp_path):
    snapshot = tmp_path / "cache" / "models--user--repo" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    write_adapter(snapshot, {"layers.0.q_proj": (torch.ones(2, 8), torch.ones(4, 2))}, r=2)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    assert load_experts("user/repo").names == ("repo",)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/no/such/model", "there is no folder '/no/such/model': '/no' is not there"),
        ("./modle", "there is no folder './modle' (did you mean 'model'?)"),
        ("./other", "there is no folder './other' ('.' holds model)"),
        ("model/a/b", "there is no folder 'model/a/b': 'model/a' is not there"),
        ("a/b/c", "there is no folder 'a/b/c': 'a' is not there"),
        ("model/..", None),
    ],
)
def test_a_path_that_is_not_there_is_no_id(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_asked", lambda *_: pytest.fail("asked"))
    make_tokenizer(tmp_path / "model")
    if said is None:
        assert hub.model_options(path) == {}
        return
    for load in (load_tokenizer, load_config):
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(caught.value) == said
