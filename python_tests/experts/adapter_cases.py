"""Adapters to read: a good folder, ways to change it, and the check that a folder is refused."""

import json
from pathlib import Path

import pytest
import torch
from builders import lora_config, write_adapter
from safetensors.torch import load_file, save_file

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats import read_adapter
from moerge_ext.files.safefile import AdapterError

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
A_KEY, B_KEY = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def factors(d=8, o=6, r=4, dtype=torch.float32):
    return torch.randn(r, d).to(dtype), torch.randn(o, r).to(dtype)


def good_adapter(folder: Path) -> Path:
    """Two modules of rank 4."""
    return write_adapter(folder, {Q: factors(), UP: factors(8, 12)})


def set_config(folder, **fields):
    (folder / CONFIG).write_text(json.dumps(lora_config() | fields))


def set_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder, *words):
    """The folder is refused, by the reader and by load_experts, with all these words; returns the error."""
    with pytest.raises(AdapterError) as caught:
        read_adapter("bad", folder)
    with pytest.raises(ValueError) as loaded:
        load_experts({"bad": folder})
    for word in words:
        assert word.lower() in str(caught.value).lower()
        assert word.lower() in str(loaded.value).lower()
    assert "bad" in str(loaded.value)
    return caught.value


def two_experts(folder: Path) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Write experts a (rank 2; q and k) and b (rank 3; q alone), scaling 2; returns the factors of each."""
    q, k = "layers.0.q_proj", "layers.0.k_proj"
    made = {"a": {q: factors(r=2), k: factors(r=2)}, "b": {q: factors(r=3)}}
    for name, modules in made.items():
        rank = next(iter(modules.values()))[0].shape[0]
        write_adapter(folder / name, modules, r=rank, alpha=2 * rank)
    return made
