"""Readers of adapter folders: what is read, and every broken file that is refused."""

import json
import os
import pickle
import struct

import pytest
import torch
from adapter_cases import A_KEY, B_KEY, CONFIG, UP, WEIGHTS, Q, factors, good_adapter, refused, set_config, set_tensors
from builders import write_adapter
from safetensors.torch import load_file

from moerge_ext.experts.formats.peft import AdapterError, read_adapter, write_gates


@pytest.fixture
def folder(tmp_path):
    return good_adapter(tmp_path / "expert")


def test_reads_a_folder(folder):
    adapter = read_adapter("e", folder)
    stored = load_file(folder / WEIGHTS)
    assert adapter.name == "e" and adapter.base_model == "tiny" and set(adapter.modules) == {Q, UP}
    assert torch.equal(adapter.modules[Q].lora_A, stored[A_KEY])
    assert torch.equal(adapter.modules[Q].lora_B, stored[B_KEY])
    assert adapter.modules[Q].scaling == 2.0 and adapter.modules[Q].bias is None and adapter.gates == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_the_stored_dtype(tmp_path, dtype):
    adapter = read_adapter("e", write_adapter(tmp_path, {Q: factors(dtype=dtype)}))
    assert adapter.modules[Q].lora_A.dtype == adapter.modules[Q].lora_B.dtype == dtype


def test_lora_bias_is_read(tmp_path):
    bias = torch.randn(6)
    folder = write_adapter(tmp_path, {Q: (*factors(), bias)}, lora_bias=True)
    assert torch.equal(read_adapter("e", folder).modules[Q].bias, bias)


def _rename(old, new):
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


def _set(key, tensor):
    return lambda tensors: tensors.__setitem__(key, tensor)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(B_KEY), [f"{Q}: lora_B.weight is missing"]),
        (lambda t: t.pop(A_KEY), [f"{Q}: lora_A.weight is missing"]),
        (lambda t: t.clear(), ["holds no tensor"]),
        (_set(A_KEY, torch.zeros(4, 0)), ["no elements"]),
        (_set(B_KEY, torch.zeros(0, 4)), ["no elements"]),
        (_set(A_KEY, torch.randn(3, 8)), ["ranks disagree", "[3, 8]", "[6, 4]"]),
        (_set(A_KEY, torch.empty(0)), ["got [0]", "ZeRO-3", "gathered"]),
        (_set(A_KEY, torch.randn(4, 8, 3, 3)), ["[4, 8, 3, 3]", "convolution", "modules="]),
        (_set(B_KEY, torch.randn(6)), ["must be [O, R], got [6]"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.int8)), ["I8"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.int64)), ["I64"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.uint8)), ["U8"]),
        (_set(A_KEY, torch.full((4, 8), torch.nan)), [f"{Q}: lora_A holds NaN"]),
        (_set(B_KEY, torch.full((6, 4), -torch.inf)), [f"{Q}: lora_B holds NaN or infinite"]),
        (_set(f"base_model.model.{Q}.lora_B.bias", torch.zeros(6)), ["lora_bias false", "holds lora_B.bias"]),
        (_set(f"base_model.model.{Q}.lora_B.bias", torch.zeros(7)), ["lora_B.bias must be [O=6]"]),
        (_set(f"base_model.model.{Q}.alpha", torch.tensor(4.0)), [f"{Q}.alpha", "kohya", "alpha_pattern"]),
        (_set(f"base_model.model.{Q}.lora_magnitude_vector", torch.zeros(6)), ["DoRA"]),
        (_set("base_model.model.embed.lora_embedding_A", torch.zeros(4, 9)), ["embedding"]),
        (_set("lm_head.weight", torch.zeros(9, 8)), ["lm_head.weight", "not a LoRA weight"]),
        (
            lambda t: [t.pop(k) for k in list(t)] + [t.update({"base_model.model.x.weight": torch.ones(1)})],
            ["no LoRA weight"],
        ),
        (_rename(A_KEY, "base_model.model..lora_A.weight"), ["not a module path"]),
        (_rename(A_KEY, "base_model.model.a b.lora_A.weight"), ["not a module path"]),
        (_rename(A_KEY, f"base_model.model.{'x' * 600}.lora_A.weight"), ["600 characters"]),
    ],
    ids=range(24),
)
def test_refused_tensors(folder, change, words):
    set_tensors(folder, change)
    refused(folder, *words)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        b"garbage" * 100,
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 99_000_000) + b"{}",
        header(**{A_KEY: {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}}),
        header(**{A_KEY: {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}),
        header(**{A_KEY: {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]}}) + bytes(16),
        header(**{A_KEY: {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}) + bytes(16),
        header(**{A_KEY: {"dtype": "Q99", "shape": [2, 2], "data_offsets": [0, 16]}}) + bytes(16),
    ],
    ids=range(10),
)
def test_refused_safetensors(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "not a valid safetensors file")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_truncated_safetensors(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * kept)])
    refused(folder, "not a valid safetensors file")


def test_missing_files(folder):
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(folder, CONFIG + " is missing", "so is " + WEIGHTS, "pickle")


def test_directories_in_place_of_files(folder):
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink()
        (folder / name).mkdir()
    refused(folder, CONFIG + " must be a regular file", WEIGHTS + " must be a regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(folder):
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)
    refused(folder, "regular file")


def test_folder_that_is_a_file_or_missing(folder):
    refused(folder / CONFIG, "not a folder")
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter("bad", folder / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "moerge_gates.safetensors"])
def test_links_out_of_the_folder(folder, tmp_path, name):
    write_gates(folder, {Q: torch.zeros(8)}, kind="sigmoid-gate")
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, "link out of its folder", name)


def test_links_that_stay_inside_and_linked_folders(folder, tmp_path):
    (folder / WEIGHTS).rename(folder / "real")
    (folder / WEIGHTS).symlink_to("real")
    (tmp_path / "alias").symlink_to(folder)
    assert set(read_adapter("e", tmp_path / "alias").modules) == {Q, UP}


def test_a_loop_of_links(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)
    refused(folder, "missing or unreadable")


def test_all_problems_in_one_error(folder):
    set_config(folder, use_dora=True, bias="some", layer_replication=[[0, 2]])
    set_tensors(folder, lambda t: (t.pop(B_KEY), _set("junk", torch.zeros(1))(t)))
    (folder / "moerge_gates.safetensors").write_bytes(b"x")
    error = refused(folder, "DoRA", "bias must be", "layer_replication", "lora_B.weight is missing", "'junk'")
    assert "moerge_gates" in str(error) and len(error.problems) == 6


def test_errors_survive_pickling(folder):
    set_config(folder, use_dora=True, bias="some")
    error = refused(folder, "DoRA")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, AdapterError) and str(again) == str(error) and again.problems == error.problems


def test_many_problems_are_counted(folder):
    set_tensors(folder, lambda t: t.update({f"junk{i}": torch.zeros(1) for i in range(300)}))
    error = refused(folder, "more problems")
    assert len(error.problems) == 300 and len(str(error)) < 20_000


@pytest.mark.parametrize("name", ["non_lora_trainables.bin", "trainable_params.bin", "vit.safetensors"])
def test_what_was_trained_beside_the_lora_is_said(folder, name):
    (folder / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=f"{name} is not read.*trained beside the LoRA"):
        read_adapter("e", folder)
