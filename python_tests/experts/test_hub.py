"""Hub ids: resolved in a cache made by hand, without a network."""

import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from adapter_cases import factors
from builders import write_adapter

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats.peft import write_gates
from moerge_ext.experts.hub import find_adapter

Q, K = "layers.0.q_proj", "layers.0.k_proj"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hand-made cache of hub repository user/repo, with its adapter at the top and in a folder; no
    network.
    """
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    repo = tmp_path / "cache" / "models--user--repo"
    write_adapter(tmp_path / "source", {Q: factors()})
    write_gates(tmp_path / "source", {Q: torch.ones(8)}, kind="sigmoid-gate")
    (repo / "blobs").mkdir(parents=True)
    for ref in ("main", "v2"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(COMMIT)
    for inner in ("", "nested/expert"):
        folder = repo / "snapshots" / COMMIT / inner
        folder.mkdir(parents=True, exist_ok=True)
        for file in (tmp_path / "source").iterdir():
            blob = repo / "blobs" / (f"{inner.replace('/', '')}{file.name}".encode().hex())
            blob.write_bytes(file.read_bytes())
            (folder / file.name).symlink_to(os.path.relpath(blob, folder))
    return repo


@pytest.mark.parametrize(
    "source, name",
    [
        ("user/repo", "repo"),
        ("user/repo@v2", "repo"),
        (f"user/repo@{COMMIT}", "repo"),
        ("user/repo/nested/expert", "expert"),
        ("user/repo/nested/expert@main", "expert"),
    ],
)
def test_hub_ids(hub_cache, source, name):
    bank = load_experts([source])
    assert bank.names == (name,) and bank.modules[Q].has_gate["sigmoid-gate"].all()
    assert bank.folders[0].is_relative_to(hub_cache / "snapshots")


@pytest.mark.parametrize(
    "source",
    [
        "user/repo@gone",
        "user/other",
        "user/repo/missing",
        "user/../repo",
        "user",
        "user/repo@",
        "/user/repo",
        "a/b/*",
    ]
    + [
        "user/repo/nested/expert/adapter_config.json",
        Path("user/repo"),
        "user/re po",
        "https://huggingface.co/user",
    ],
)
def test_hub_ids_that_are_not_found(hub_cache, source):
    with pytest.raises(ValueError, match="hub|not a folder"):
        load_experts([source])


def test_local_folders_win_over_the_hub(hub_cache, tmp_path):
    write_adapter(tmp_path / "user" / "repo", {K: factors()})
    assert list(load_experts("user/repo").modules) == [K]
    assert find_adapter("user/repo")[1] == Path("user/repo")


def test_hub_links_to_another_repository_are_refused(hub_cache, tmp_path):
    other = tmp_path / "cache" / "models--user--other" / "blobs"
    other.mkdir(parents=True)
    link = hub_cache / "snapshots" / COMMIT / "adapter_model.safetensors"
    link.resolve().rename(other / "weights")
    link.unlink()
    link.symlink_to(other / "weights")
    with pytest.raises(ValueError, match="link out of its folder"):
        load_experts("user/repo")


def test_only_the_adapters_files_are_fetched(monkeypatch, tmp_path):
    asked = {}

    def fake(repo, **options):
        asked.update(options, repo=repo)
        return str(write_adapter(tmp_path / "sub", {Q: factors()}).parent)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    load_experts("user/repo/sub@refs/pr/3")
    assert asked["repo"] == "user/repo" and asked["revision"] == "refs/pr/3"
    assert asked["allow_patterns"] == [
        "sub/adapter_config.json",
        "sub/adapter_model.safetensors",
        "sub/adapter_model-*-of-*.safetensors",
        "sub/adapters.safetensors",
        "sub/moerge_gates*.safetensors",
        "sub/moerge_examples*.safetensors",
        "sub/moerge_manifest.json",
    ]
