"""Folders and files that hold no adapter that can be read: the reason names the cause and the way out."""

import json

import pytest
import torch
from adapter_cases import CONFIG, WEIGHTS, Q, factors, refused, set_config
from builders import lora_config, write_adapter
from safetensors.torch import save_file

from moerge_ext.experts.bank import load_experts

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 134219096\n"


@pytest.fixture
def folder(tmp_path):
    """A config without weights."""
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.parametrize(
    "content, words",
    [
        (POINTER, ["Git-LFS pointer", "git lfs pull"]),
        (b"", ["empty file", "interrupted"]),
        (b"<!DOCTYPE html>\n<html>", ["web page"]),
        (b"PK\x03\x04" + bytes(60), ["pickle of torch.save"]),
        (b"\x80\x02}q\x00.", ["pickle of torch.save"]),
        (b"GGUF" + bytes(60), ["GGUF"]),
    ],
)
@pytest.mark.parametrize("file", [WEIGHTS, "adapters.safetensors", "moerge_gates.safetensors"])
def test_a_file_that_is_something_else(tmp_path, file, content, words):
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    if file == "adapters.safetensors":
        (folder / WEIGHTS).unlink()
    (folder / file).write_bytes(content)
    refused(folder, f"{file} is not a valid safetensors file", *words)


def test_a_config_that_is_a_pointer(tmp_path):
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    (folder / CONFIG).write_bytes(POINTER)
    refused(folder, "adapter_config.json is not valid JSON in UTF-8: it is a Git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    "name, keys, words",
    [
        (
            "kohya.safetensors",
            ["lora_unet_down_blocks_0.lora_down.weight", "lora_te_x.alpha"],
            ["kohya", "load_lora_weights"],
        ),
        ("pytorch_lora_weights.safetensors", ["unet.down.0.to_q.lora.down.weight"], ["diffusers", "load_lora_weights"]),
        ("pytorch_lora_weights.safetensors", ["transformer.blocks.0.to_q.lora_A.weight"], ["diffusers"]),
        ("lora.safetensors", [f"base_model.model.{Q}.lora_A.weight"], ["rename it to adapter_model.safetensors"]),
        ("model.safetensors", [f"{Q}.weight"], ["whole layers"]),
    ],
)
def test_other_layouts(folder, name, keys, words):
    save_file({key: torch.ones(2, 2) for key in keys}, folder / name)
    refused(folder, f"{WEIGHTS} is missing", *words)
    (folder / CONFIG).unlink()
    refused(folder, *words)
    with pytest.raises(ValueError, match=f"not a folder.*{words[0]}"):
        load_experts(folder / name)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin", "pytorch_model.bin"])
def test_pickles(folder, name):
    (folder / name).write_bytes(b"x")
    missing = [] if name == "pytorch_adapter.bin" else [f"{WEIGHTS} is missing"]  # the library adapters' own layout
    refused(folder, *missing, name, "pickle")


def test_more_than_the_weights_is_missing(folder):
    refused(folder, f"{WEIGHTS} is missing")
    (folder / "adapters.npz").write_bytes(b"x")
    refused(folder, "old MLX-LM", "adapters.safetensors")


def test_the_weights_in_place_of_their_folder(tmp_path):
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    with pytest.raises(ValueError, match=f"pass the folder of the file, {folder}"):
        load_experts(folder / WEIGHTS)
    with pytest.raises(ValueError, match="or a .gguf file"):
        load_experts(folder / CONFIG)


@pytest.mark.parametrize(
    "kind", ["LOHA", "HIRA", "FOURIERFT", "OFT", "LN_TUNING", "TRAINABLE_TOKENS", "PREFIX_TUNING", "X"]
)
def test_other_kinds_of_adapter(tmp_path, kind):
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    (folder / CONFIG).write_text(json.dumps(lora_config() | {"peft_type": kind}))
    words = {
        "LOHA": ["--to-lora"],
        "FOURIERFT": ["--to-lora"],
        "OFT": ["--to-lora"],
        "LN_TUNING": ["trains the norms"],
        "TRAINABLE_TOKENS": ["rows of the base's embedding"],
        "PREFIX_TUNING": ["no layer"],
        "X": ["'X'"],
    }
    error = refused(folder, "peft_type must be 'LORA'", kind, *words.get(kind, []))
    assert len(error.problems) == 1
    set_config(folder)
    assert load_experts(folder)


@pytest.mark.parametrize(
    "kind, words",
    [
        ("LOHA", ["a LoRA can be made of LOHA: moerge convert FOLDER OUT --to-lora --model MODEL"]),
        ("PREFIX_TUNING", ["trains tokens or activations"]),
    ],
)
def test_another_kind_of_adapter(tmp_path, kind, words):
    folder = write_adapter(tmp_path / "expert", {Q: factors()})
    set_config(folder, peft_type=kind)
    refused(folder, "peft_type must be 'LORA', 'ADALORA' or 'IA3'", f"got '{kind}'", *words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("adapter_0.pt", "torchtune"),
        ("lit_model.pth.lora", "LitGPT"),
        ("zero_to_fp32.py", "DeepSpeed"),
        ("pytorch_model_fsdp_0", "merge-weights"),
        ("pytorch_model.bin", "whole model"),
        ("adapter_model.pt", "rename it to adapter_model.bin"),
        ("peft.nemo", "NeMo"),
    ],
)
def test_what_other_tools_write(folder, name, words):
    """With a config beside it or alone, as a folder or the file itself: what it is, and no advice that cannot help."""
    (folder / name).write_bytes(b"")
    error = refused(folder, name, words)
    assert "--allow-pickle" not in str(error) or name == "adapter_model.pt"
    (folder / CONFIG).unlink()
    refused(folder, "it is no adapter", name, words)
    refused(folder / name, "not a folder", words)
    if words == "LitGPT":  # which copies the base's config there
        (folder / "config.json").write_text('{"model_type": "llama"}')
        refused(folder, "it is no adapter", name, words)
