"""What is sent to the hub, against a stand-in for its client and, for what a hub refuses, a server of this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from builders import random_experts, write_adapter
from gate_builders import llama
from huggingface_hub import HfApi, ModelCard

import moerge_ext as moerge
from moerge_ext.commands import main as cli
from moerge_ext.experts.catalogue import catalogue
from moerge_ext.experts.manifest import MANIFEST_FILE
from moerge_ext.exporting.push import README, pack, push_expert, send

EMBEDDER = moerge.Embedder(lambda texts: torch.ones(len(texts), 4), name="some")
COMMIT = "https://huggingface.co/user/sql/commit/" + "1" * 40
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


class Hub:
    """Keeps what it is sent, as {revision: {file: content}}."""

    def __init__(self, private=False, there=()):
        self.private, self.commits, self.calls = private, {None: dict.fromkeys(there, b"theirs")}, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private))
        return SimpleNamespace(repo_id=f"user/{repo_id.split('/')[-1]}")

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.commits.setdefault(branch, {})

    def file_exists(self, repo_id, name, *, revision):
        return name in self.commits[revision]

    def create_commit(self, repo_id, operations, *, commit_message, revision):
        self.calls.append(("create_commit", repo_id, commit_message))
        for operation in operations:
            with operation.as_file() as file:
                self.commits[revision][operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def expert(tmp_path):
    """A described and indexed expert, in a folder that has other things too."""
    random_experts(llama(), tmp_path, ["sql"], ["q_proj"])
    moerge.describe(tmp_path / "sql", [], EMBEDDER, instruction="Write `SQL` <for> a\nquestion.")
    moerge.index_examples(tmp_path / "sql", [{"text": "x"}], EMBEDDER)
    for name in ("optimizer.pt", ".env", "data.jsonl", "training_args.bin"):
        (tmp_path / "sql" / name).write_text("secret")
    (tmp_path / "sql" / ".moerge-train-gates").mkdir()
    return tmp_path / "sql"


def test_only_the_known_files_and_one_commit(expert, tmp_path):
    hub = Hub()
    before = {file.name for file in expert.iterdir()}
    assert push_expert(expert, "user/sql", api=hub) == "https://hub/user/sql/commit/1"
    sent = hub.commits[None]
    gates = ["moerge_examples.some.safetensors", "moerge_gates.instruction-embedding.safetensors"]
    assert sorted(sent) == sorted([*ADAPTER, *gates, "moerge_gates.safetensors", README, MANIFEST_FILE])
    assert all(sent[name] == (expert / name).read_bytes() for name in sent if name not in (README, MANIFEST_FILE))
    assert [call[0] for call in hub.calls] == ["create_repo", "create_commit"]
    assert {file.name for file in expert.iterdir()} == before
    there = tmp_path / "there"
    there.mkdir()
    for name, content in sent.items():
        (there / name).write_bytes(content)
    assert moerge.load_experts(there).gate_kinds == ("instruction-embedding", "sigmoid-gate")
    assert catalogue([there])[0].notes == [] and MANIFEST_FILE in sent
    (there / "moerge_gates.safetensors").unlink()
    assert "not as in" in catalogue([there])[0].notes[0]


def test_the_card(expert):
    parcel = pack(expert, "user/sql", revision="v2")
    found = ModelCard(parcel.files[README].decode())
    assert (found.data.base_model, found.data.library_name, found.data.pipeline_tag) == (
        "tiny",
        "peft",
        "text-generation",
    )
    assert {"moerge", "lora"} <= set(found.data.tags)
    for text in (
        'load_experts(["user/sql@v2", "another/expert"])',
        'method="phatgoose"',
        "`sigmoid-gate`",
        "by `some`",
        "What it is for: Write 'SQL' &lt;for> a question.",
    ):
        assert text in found.text, found.text


def test_readme(expert):
    """One of the folder is sent as it is; ours gives way to one of the repository; PEFT's empty one counts as none."""
    own = b"---\nlicense: mit\n---\n# My expert\n"
    for own_one, there, sent in ((own, True, own), (own, False, own), (None, True, b"theirs"), (None, False, None)):
        hub = Hub(there=[README] if there else [])
        (expert / README).unlink(missing_ok=True)
        if own_one:
            (expert / README).write_bytes(own_one)
        _, names = send(pack(expert, "user/sql"), api=hub)
        assert hub.commits[None][README] == sent if sent else hub.commits[None][README].startswith(b"---\nbase_model")
        assert (README in names) == (own_one is not None or not there)


def test_peft_s_empty_card_counts_as_none(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / README).exists()
    parcel = pack(tmp_path / "a", "user/a", base_model="user/base")
    assert parcel.generated and b"More Information Needed" not in parcel.files[README]
    assert json.loads(parcel.files[ADAPTER[0]])["base_model_name_or_path"] == "user/base"
    text = (tmp_path / "a" / README).read_text().replace("# Model Card for Model ID", "# My model")
    (tmp_path / "a" / README).write_text(text)
    assert not pack(tmp_path / "a", "user/a", base_model="user/base").generated


def test_a_base_of_this_machine_is_refused_and_named_anew(expert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    config = json.loads((expert / ADAPTER[0]).read_text())
    for base in (str(tmp_path / "base"), "./base", "models/base", "C:\\models\\base", "a/b/c"):
        (expert / ADAPTER[0]).write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match="by a path of this machine.*--base-model"):
            pack(expert, "user/sql")
    with pytest.raises(ValueError, match="--base-model must be an id on the hub"):
        pack(expert, "user/sql", base_model="/home/x")
    hub = Hub()
    push_expert(expert, "user/sql", base_model="user/base", api=hub)
    assert b"a/b/c" not in b"".join(hub.commits[None].values()) and b"tiny" not in hub.commits[None][README]
    assert b"user/base" in hub.commits[None]["moerge_gates.safetensors"][:2000]
    manifest = json.loads(hub.commits[None][MANIFEST_FILE])
    assert manifest["base_model"] == "user/base" and README not in manifest["files"]


def test_the_card_has_the_user_whom_the_hub_adds(expert):
    hub = Hub()
    assert b'load_experts(["USER/sql"' in pack(expert, "sql").files[README]
    assert push_expert(expert, "sql", api=hub) == "https://hub/user/sql/commit/1"
    assert b'load_experts(["user/sql"' in hub.commits[None][README]


def test_revision_and_private(expert):
    hub = Hub(private=True)
    push_expert(expert, "user/sql", private=True, revision="v2", api=hub)
    assert hub.calls[0] == ("create_repo", "user/sql", True) and hub.commits[None] == {} and len(hub.commits["v2"]) == 7
    hub = Hub(private=False)
    with pytest.raises(ValueError, match="^repository user/sql is there already and public"):
        push_expert(expert, "user/sql", private=True, api=hub)
    assert hub.commits == {None: {}}


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("link", "adapter_model.safetensors is a link out of its folder"),
        ("nan", "NaN or infinite"),
        ("repo", "is no repository id such as user/name"),
        ("nowhere", "there is no local folder"),
        ("model", "it is a model .LlamaForCausalLM"),
        ("dora", "use_dora"),
        ("mlx", "of MLX-LM: `moerge convert` it"),
    ],
)
def test_what_is_not_sent(expert, tmp_path, how, text):
    folder, repo = expert, "user/sql"
    if how == "link":
        (expert / ADAPTER[1]).rename(tmp_path / "weights")
        (expert / ADAPTER[1]).symlink_to(tmp_path / "weights")
    elif how == "nan":
        write_adapter(expert, {"model.layers.0.self_attn.q_proj": (torch.full((4, 16), torch.nan), torch.ones(16, 4))})
        for file in expert.glob("moerge_*"):
            file.unlink()
    elif how == "repo":
        repo = "https://hub/user/sql"
    elif how == "nowhere":
        folder = tmp_path / "nowhere"
    elif how == "model":
        folder = tmp_path / "model"
        llama().save_pretrained(folder)
    elif how == "dora":
        folder = write_adapter(tmp_path / "d", {"up": (torch.ones(4, 8), torch.ones(6, 4))}, use_dora=True)
    else:
        from format_cases import write_mlx

        folder = write_mlx(tmp_path / "mlx", {"up": (torch.ones(4, 8), torch.ones(6, 4))})
    hub = Hub()
    with pytest.raises(ValueError, match=text):
        push_expert(folder, repo, api=hub)
    assert hub.calls == []


def test_stale_gates_are_said(expert):
    write_adapter(
        expert, {f"model.layers.{i}.self_attn.q_proj": (torch.ones(4, 16), torch.ones(16, 4)) for i in (0, 1)}
    )
    notes = pack(expert, "user/sql").notes
    assert len(notes) == 1 and "made for other weights" in notes[0]


class Server(HTTPServer):
    """A hub of this machine, as far as a push asks for one: it keeps what it is sent, or refuses all."""

    def __init__(self, refuses=None):
        super().__init__(("127.0.0.1", 0), Answers)
        self.refuses, self.files = refuses, {}

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return HfApi(endpoint=f"http://127.0.0.1:{self.server_port}", token="hf_made_up")

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refuses:
            return self.answer(self.server.refuses, {"error": "you shall\nnot pass"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/commit/main"):
            rows = [json.loads(line) for line in body.splitlines()]
            self.server.files |= {
                r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in rows if r["key"] == "file"
            }
            return self.answer(200, {"commitUrl": COMMIT, "commitOid": "1" * 40})
        self.answer(200, {"url": "https://huggingface.co/user/sql", "errors": [], "warnings": []})

    def do_GET(self):
        self.answer(self.server.refuses or 200, {"id": "user/sql", "private": True, "sha": "0" * 40})

    def do_HEAD(self):
        self.answer(404, {})

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_args):
        pass


def test_over_http_by_the_client_itself(expert):
    server = Server()
    with server as api:
        assert push_expert(expert, "user/sql", private=True, api=api) == COMMIT
    want = pack(expert, "user/sql").files
    assert server.files.keys() == want.keys()
    for name, content in want.items():
        assert server.files[name] == (content if isinstance(content, bytes) else content.read_bytes())


@pytest.mark.parametrize(
    ("status", "text"), [(401, "hf auth login"), (403, "your token may not write to user/sql"), (500, "check the id")]
)
def test_what_the_hub_refuses_is_one_line(expert, status, text):
    with Server(refuses=status) as api, pytest.raises(ValueError, match=text) as caught:
        push_expert(expert, "user/sql", api=api)
    assert "\n" not in str(caught.value) and str(status) in str(caught.value)


def test_without_a_network(expert, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="^user/sql could not be pushed .OfflineModeIsEnabled.*check the network") as e:
        push_expert(expert, "user/sql", api=HfApi(token="hf_made_up"))
    assert "\n" not in str(e.value)


def test_command(expert, capsys, monkeypatch):
    hub = Hub(there=[README])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("a network"))
    assert cli.main(["push", str(expert), "user/sql", "--revision", "v2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("would be sent to user/sql@v2:\n") and "bytes  moerge_gates.safetensors" in said
    assert "secret" not in said and ".env" not in said and "library_name: peft" in said
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("moerge_ext.exporting.push.unreached", lambda: "ConnectError: nobody")
    assert cli.main(["push", str(expert), "user/sql"]) == 2
    assert "could not be pushed, as the hub cannot be reached (ConnectError: nobody)" in capsys.readouterr().err
    monkeypatch.setattr("moerge_ext.exporting.push.unreached", lambda: None)
    assert cli.main(["push", str(expert), "user/sql"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("sent adapter_config.json, ") and "README.md of the repository is kept" in said
    assert cli.main(["push", str(expert), "user/sql", "--private"]) == 2
    assert "is there already and public" in capsys.readouterr().err
