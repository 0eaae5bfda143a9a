"""Readers of adapter folders: what is read, and every reason to refuse."""

import json
import math
import os
import pickle
import shutil
import struct
import time

import pytest
import torch
from builders import lora_config, write_adapter
from safetensors.torch import load_file, save_file

from moerge_ext.adapter_files.patterns import ModulePattern
from moerge_ext.adapters import AdapterError, inspect_adapter, read_adapter, read_gates, write_gates
from moerge_ext.experts import load_experts

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
A_KEY, B_KEY = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def factors(d=8, o=6, r=4, dtype=torch.float32):
    return torch.randn(r, d).to(dtype), torch.randn(o, r).to(dtype)


@pytest.fixture
def folder(tmp_path):
    """A good adapter with two modules of rank 4."""
    return write_adapter(tmp_path / "expert", {Q: factors(), UP: factors(8, 12)})


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


@pytest.mark.parametrize(
    "fields, rank, scaling",
    [
        ({}, 4, 8 / 4),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"lora_alpha": 1.5}, 4, 1.5 / 4),
        ({"rank_pattern": {"q_proj": 2}}, 2, 8 / 2),
        ({"alpha_pattern": {"q_proj": 3}}, 4, 3 / 4),
        ({"rank_pattern": {"^q_proj": 2}}, 4, 8 / 4),
        ({"rank_pattern": {f"^{Q}": 2}, "use_rslora": True}, 2, 8 / math.sqrt(2)),
        ({"rank_pattern": {r"layers\.\d+\..*(q|k)_proj": 2}}, 2, 8 / 2),
        ({"alpha_pattern": {"proj": 5, "q_proj": 6, ".*": 7}}, 4, 6 / 4),
    ],
)
def test_scaling_rules(tmp_path, fields, rank, scaling):
    folder = write_adapter(tmp_path, {Q: factors(r=rank)}, **{"r": 4, "alpha": 8} | fields)
    assert read_adapter("e", folder).modules[Q].scaling == pytest.approx(scaling)


def test_lora_bias_is_read(tmp_path):
    bias = torch.randn(6)
    folder = write_adapter(tmp_path, {Q: (*factors(), bias)}, lora_bias=True)
    assert torch.equal(read_adapter("e", folder).modules[Q].bias, bias)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["k_proj"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {
            "init_lora_weights": False,
            "fan_in_fan_out": True,
            "revision": "main",
            "megatron_core": "megatron.core",
        },
        {"target_modules": ["q_proj", "mlp.up_proj", "never_there"]},
        {"target_modules": r"^(?!.*vision).*(a+)+proj$"},
        {"loftq_config": {}, "modules_to_save": None, "layer_replication": [], "qalora_group_size": 16},
        {"from_the_future": None, "another": False, "third": [], "fourth": {}, "fifth": 0},
        {"auto_mapping": {"base_model_class": "LlamaModel", "parent_library": "transformers.models.llama"}},
    ],
)
def test_harmless_fields_are_accepted(folder, fields):
    set_config(folder, **fields)
    assert set(inspect_adapter("e", folder).modules) == {Q, UP}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"peft_type": "IA3"}, ["peft_type", "IA3"]),
        ({"peft_type": None}, ["peft_type"]),
        ({"use_dora": True}, ["DoRA"]),
        ({"use_qalora": True}, ["QALoRA"]),
        ({"use_bdlora": {"nblocks": 2}}, ["BD-LoRA"]),
        ({"alora_invocation_tokens": [1, 2]}, ["aLoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"]),
        ({"trainable_token_indices": [5]}, ["trainable_token_indices"]),
        ({"target_parameters": ["experts.w"]}, ["target_parameters"]),
        ({"layer_replication": [[0, 4], [2, 5]]}, ["layer_replication"]),
        ({"kasa_config": {"beta": 1e-4}}, ["KaSA"]),
        ({"arrow_config": {"top_k": 3}}, ["Arrow"]),
        ({"bias": "all"}, ["bias must be 'none'"]),
        ({"init_lora_weights": "pissa"}, ["pissa", "convert"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["convert"]),
        ({"init_lora_weights": "olora"}, ["convert"]),
        ({"init_lora_weights": "corda"}, ["convert"]),
        ({"init_lora_weights": "loftq"}, ["convert"]),
        ({"init_lora_weights": "something"}, ["init_lora_weights must be one of"]),
        ({"init_lora_weights": ["gaussian"]}, ["init_lora_weights must be one of"]),
        ({"brand_new_field": {"on": True}}, ["brand_new_field", "unknown"]),
        ({"enable_lora": [True, False, True]}, ["MergedLinear"]),
        (
            {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
            ["auto_mapping", "never imported"],
        ),
        ({"auto_mapping": {"custom": "evil.module"}}, ["auto_mapping"]),
        ({"megatron_core": "evil.module"}, ["megatron_core", "evil.module"]),
        ({"megatron_config": {"a": 1}}, ["megatron"]),
        ({"r": 0}, ["r must be a positive integer, got 0"]),
        ({"r": -4}, ["r must be"]),
        ({"r": "4"}, ["r must be"]),
        ({"r": True}, ["r must be"]),
        ({"r": None}, ["r must be"]),
        ({"lora_alpha": "8"}, ["lora_alpha must be a finite number"]),
        ({"lora_alpha": None}, ["lora_alpha"]),
        ({"lora_alpha": True}, ["lora_alpha"]),
        ({"lora_alpha": 10**400}, ["lora_alpha"]),
        ({"use_rslora": "yes"}, ["use_rslora must be true or false"]),
        ({"rank_pattern": ["q_proj"]}, ["rank_pattern must be an object"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']"]),
        ({"alpha_pattern": {"q_proj": "x"}}, ["alpha_pattern['q_proj']"]),
        ({"rank_pattern": {"(a+)+b": 4}}, ["repeat inside a repeat"]),
        ({"rank_pattern": {"(?=x)": 4}}, ["simple patterns"]),
        ({"rank_pattern": {"x" * 2000: 4}}, ["1024 characters"]),
        ({"r": 8}, [f"{Q}: the config says rank 8 (r), the tensors have 4"]),
        ({"rank_pattern": {"up_proj": 2}}, [f"{UP}: the config says rank 2 (rank_pattern 'up_proj')"]),
        ({"lora_bias": True}, ["lora_bias true", "lacks lora_B.bias"]),
        (
            {"target_modules": ["q_proj"]},
            [f"{UP}: the file has weights for it, target_modules does not name it"],
        ),
        ({"target_modules": {"q_proj": 1}}, ["target_modules must be a list"]),
        ({"base_model_name_or_path": {"a": 1}}, ["base_model_name_or_path must be a string"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_refused_configs(folder, fields, words):
    set_config(folder, **fields)
    refused(folder, *words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b"\xff\xfe{}", ["UTF-8"]),
        (b"[1, 2]", ["JSON object"]),
        (b'"LORA"', ["JSON object"]),
        (b"[" * 200_000, ["nested too deeply"]),
        (b'{"a":' * 100_000, ["nested too deeply"]),
        (b'{"r": 4, "r": 8}', ["stands twice", "'r'"]),
        (b'{"lora_alpha": NaN}', ["NaN"]),
        (b'{"lora_alpha": -Infinity}', ["Infinity"]),
        (b'{"r": 1' + b"0" * 5000 + b"}", ["not valid JSON"]),
        (b'{"base_model_name_or_path": "\\ud800", "peft_type": "IA3"}', ["peft_type"]),
        (b" " * (5 << 20), ["at most"]),
    ],
    ids=range(13),
)
def test_refused_json(folder, content, words):
    (folder / CONFIG).write_bytes(content)
    refused(folder, *words)


def test_infinite_alpha(folder):
    text = json.dumps(lora_config()).replace('"lora_alpha": 8', '"lora_alpha": 1e999')
    (folder / CONFIG).write_text(text)
    refused(folder, "lora_alpha must be a finite number, got inf")


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
        (_set(A_KEY, torch.randn(4, 8, 3, 3)), ["[4, 8, 3, 3]", "convolution"]),
        (_set(B_KEY, torch.randn(6)), ["must be [O, R], got [6]"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.int8)), ["I8"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.int64)), ["I64"]),
        (_set(A_KEY, torch.ones(4, 8, dtype=torch.float8_e4m3fn)), ["F8_E4M3"]),
        (_set(A_KEY, torch.full((4, 8), torch.nan)), [f"{Q}: lora_A holds NaN"]),
        (_set(B_KEY, torch.full((6, 4), -torch.inf)), [f"{Q}: lora_B holds NaN or infinite"]),
        (_set(f"base_model.model.{Q}.lora_B.bias", torch.zeros(6)), ["lora_bias false", "holds lora_B.bias"]),
        (_set(f"base_model.model.{Q}.lora_B.bias", torch.zeros(7)), ["lora_B.bias must be [O=6]"]),
        (_set(f"base_model.model.{Q}.lora_magnitude_vector", torch.zeros(6)), ["DoRA"]),
        (_set("base_model.model.embed.lora_embedding_A", torch.zeros(4, 9)), ["embedding"]),
        (_set("base_model.model.lm_head.weight", torch.zeros(9, 8)), ["lm_head.weight", "not a LoRA weight"]),
        (_rename(A_KEY, f"base_model.model.{Q}.lora_A.default.weight"), ["is not named"]),
        (_rename(A_KEY, f"{Q}.lora_A.weight"), ["is not named"]),
        (_rename(A_KEY, "base_model.model..lora_A.weight"), ["not a module path"]),
        (_rename(A_KEY, "base_model.model.a b.lora_A.weight"), ["not a module path"]),
        (_rename(A_KEY, f"base_model.model.{'x' * 600}.lora_A.weight"), ["600 characters"]),
    ],
    ids=range(23),
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
    refused(folder, CONFIG + " is missing", WEIGHTS + " is missing", "pickle")


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
    set_config(folder, use_dora=True, bias="all", modules_to_save=["lm_head"])
    set_tensors(folder, lambda t: (t.pop(B_KEY), _set("junk", torch.zeros(1))(t)))
    (folder / "moerge_gates.safetensors").write_bytes(b"x")
    error = refused(folder, "DoRA", "bias must be", "modules_to_save", "lora_B.weight is missing", "'junk'")
    assert "moerge_gates" in str(error) and len(error.problems) == 6


def test_errors_survive_pickling(folder):
    set_config(folder, use_dora=True, bias="all")
    error = refused(folder, "DoRA")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, AdapterError) and str(again) == str(error) and again.problems == error.problems


def test_many_problems_are_counted(folder):
    set_tensors(folder, lambda t: t.update({f"junk{i}": torch.zeros(1) for i in range(300)}))
    error = refused(folder, "more problems")
    assert len(error.problems) == 300 and len(str(error)) < 20_000


# --- patterns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "self_attn.q_proj",
        "elf_attn.q_proj",
        "^model.layers.0.self_attn.q_proj",
        "^q_proj",
        "q_proj$",
    ]
    + [
        Q,
        "layers.0",
        r".*q_proj",
        r"layers\.\d+\.self_attn\.(q|k)_proj",
        r"layers\.[1-9]\..*",
        r"layers\.[^1]\..*",
    ]
    + [
        "layersx0.self_attn.q_proj",
        ".*",
        r"(?:model\.)?layers.*?proj",
        "(q|)_proj",
        r"\w+",
        "v_proj|q_proj",
        "$",
    ],
)
def test_patterns_match_as_in_peft(key):
    from peft.utils.other import get_pattern_key

    for path in (
        Q,
        "q_proj",
        "model.layers.10.self_attn.k_proj",
        "layers.0",
        "model.layersX0.self_attn.q_proj",
    ):
        assert ModulePattern(key).matches(path) == (get_pattern_key([key], path) == key and True), path


@pytest.mark.parametrize("key", ["(a|a)" * 60, "a*" * 300, "(a?b?)" * 100, ".*" * 400 + "x", "(.|.|.)" * 100 + "!"])
def test_patterns_cannot_blow_up(key):
    start = time.perf_counter()
    assert not ModulePattern(key).matches("a" * 400 + "b")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "key",
    ["", "(", ")", "a)", "*", "a**", "a{2}", r"\1", "\\", "[", "[]", "[b-a]", "(" * 20, "(?i)a", "(a*)*"],
)
def test_bad_patterns(key):
    with pytest.raises(ValueError):
        ModulePattern(key)


def test_too_many_patterns_are_refused(tmp_path):
    modules = {f"layers.{i}.{'deep.' * 20}q_proj": factors(2, 2, 1) for i in range(200)}
    patterns = {f".*{i}{'.*x' * 300}": 1 for i in range(50)}
    write_adapter(tmp_path, modules, r=1, rank_pattern=patterns)
    start = time.perf_counter()
    refused(tmp_path, "50 patterns for 200 modules: too many to match")
    assert time.perf_counter() - start < 5


# --- gates ----------------------------------------------------------------------------------------


def test_gates_round_trip(folder):
    gates = {Q: torch.randn(8), UP: torch.randn(8, dtype=torch.float64)}
    path = write_gates(
        folder,
        gates,
        kind="sigmoid-gate",
        base_model="tiny",
        global_vector=torch.ones(3),
        metadata={"steps": "9"},
    )
    assert path == folder / "moerge_gates.safetensors"
    read = read_gates(folder)["sigmoid-gate"]
    assert all(torch.equal(read.gates[key], gate.float()) for key, gate in gates.items())
    assert torch.equal(read.global_vector, torch.ones(3))
    assert read.metadata == {
        "format": "moerge-gates", "version": "1", "kind": "sigmoid-gate", "base_model": "tiny", "steps": "9"
    }  # fmt: skip
    assert read_adapter("e", folder).gates["sigmoid-gate"].gates.keys() == {Q, UP}
    assert [p.name for p in folder.iterdir() if "tmp" in p.name] == []


def test_a_second_kind_gets_a_file_of_its_own(folder):
    write_gates(folder, {Q: torch.zeros(8)}, kind="sigmoid-gate")
    other = write_gates(folder, {Q: torch.ones(8)}, kind="average-activation")
    assert other.name == "moerge_gates.average-activation.safetensors"
    assert write_gates(folder, {Q: torch.full((8,), 2.0)}, kind="average-activation") == other
    assert write_gates(folder, {Q: torch.full((8,), 3.0)}, kind="sigmoid-gate").name == "moerge_gates.safetensors"
    read = read_adapter("e", folder).gates
    assert {kind: gates.gates[Q][0].item() for kind, gates in read.items()} == {
        "average-activation": 2.0,
        "sigmoid-gate": 3.0,
    }


@pytest.mark.parametrize(
    "gates, kind",
    [
        ({}, "k"),
        ({Q: torch.zeros(2, 2)}, "k"),
        ({Q: torch.zeros(0)}, "k"),
        ({Q: torch.ones(2, dtype=torch.int64)}, "k"),
        ({Q: torch.tensor([1.0, torch.nan])}, "k"),
        ({"": torch.ones(2)}, "k"),
        ({Q: torch.ones(2)}, "Bad Kind"),
        ({Q: [1.0]}, "k"),
    ],
    ids=range(8),
)
def test_gates_that_cannot_be_written(folder, gates, kind):
    before = sorted(folder.iterdir())
    with pytest.raises(AdapterError):
        write_gates(folder, gates, kind=kind)
    assert sorted(folder.iterdir()) == before


META = {"format": "moerge-gates", "version": "1", "kind": "sigmoid-gate"}


@pytest.mark.parametrize(
    "tensors, metadata, words",
    [
        ({Q: torch.zeros(8)}, None, ["format"]),
        ({Q: torch.zeros(8)}, META | {"format": "x"}, ["format"]),
        ({Q: torch.zeros(8)}, META | {"version": "2"}, ["version", "'2'"]),
        ({Q: torch.zeros(8)}, META | {"kind": "Not OK"}, ["kind"]),
        ({Q: torch.zeros(9)}, META, ["[D=8]", "[9]"]),
        ({Q: torch.zeros(1, 8)}, META, ["must be a vector"]),
        ({Q: torch.zeros(8, dtype=torch.int32)}, META, ["float tensor, got I32"]),
        ({Q: torch.full((8,), torch.nan)}, META, ["NaN"]),
        ({Q: torch.full((8,), 1e300, dtype=torch.float64)}, META, ["infinite"]),
        ({"model.other": torch.zeros(8)}, META, ["model.other", "without LoRA"]),
        ({"__global__": torch.zeros(0)}, META, ["__global__ must be a vector"]),
    ],
    ids=range(11),
)
def test_refused_gates(folder, tensors, metadata, words):
    save_file(tensors, folder / "moerge_gates.safetensors", metadata=metadata)
    refused(folder, "moerge_gates.safetensors", *words)


def test_gate_files_that_contradict_each_other(folder):
    path = write_gates(folder, {Q: torch.zeros(8)}, kind="sigmoid-gate")
    shutil.copy(path, folder / "moerge_gates.sigmoid-gate.safetensors")
    shutil.copy(path, folder / "moerge_gates.another.safetensors")
    shutil.copy(path, folder / "moerge_gates_old.safetensors")
    refused(
        folder,
        "in another file",
        "the file's name says kind 'another'",
        "moerge_gates_old.safetensors: expected",
    )


# --- adapters that people published ---------------------------------------------------------------


@pytest.fixture
def published(shared):
    folder = shared / "data" / "adapters"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/adapters, which is not here")
    return folder


def test_published_gpt2_adapters(published):
    folders = sorted(published.glob("gpt2_*"))
    bank = load_experts(folders)
    assert len(bank) == 5 and bank.base_model == "gpt2" and bank.names == tuple(f.name for f in folders)
    attention = bank.modules["transformer.h.0.attn.c_attn"]
    assert (attention.in_features, attention.out_features, attention.rank) == (768, 2304, 8)
    projection = bank.modules["transformer.h.11.mlp.c_proj"]
    review = bank.index("gpt2_review_shibbir24")
    assert not projection.present[review] and projection.ranks[review] == 0
    stored = load_file(folders[-1] / WEIGHTS)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert torch.equal(attention.lora_B[4], stored * 4.0)


def test_published_fp16_adapter(published):
    bank = load_experts(published / "opencalm1b_r1_fp16")
    assert all(module.dtype == torch.float16 and module.rank == 1 for module in bank.modules.values())
    assert load_experts(published / "opencalm1b_r1_fp16", dtype=torch.float32).nbytes == 2 * bank.nbytes


def test_published_legacy_adapter_is_refused(published):
    refused(published / "bloom560m_legacy_mergedlinear", "MergedLinear", "adapter_model.bin is a pickle")


ACCEPTED = {
    "MetaMathQA__lora__llama-3.2-3B-rank10-target-mlp",
    "MetaMathQA__lora__llama-3.2-3B-rank32-lorafa",
    "MetaMathQA__lora__llama-3.2-3B-rank32-mica",
    "MetaMathQA__lora__llama-3.2-3B-rank32-riemannian",
    "MetaMathQA__lora__llama-3.2-3B-rank32",
    "MetaMathQA__lora__llama-3.2-3B-rank64-rslora",
    "MetaMathQA__lora__llama-3.2-3B-rank64",
    "image-gen__lora__flux2-klein-default",
    "image-gen__lora__flux2-klein-rank64",
    "text_generation_benchmark__lora__lora_r8",
}


def test_published_configs(published, tmp_path):
    """Of 103 configs of many kinds, only plain LoRA can be an expert; the others are refused by name."""
    accepted, configs = set(), sorted((published / "peft_configs").glob("*.json"))
    for path in configs:
        config = json.loads(path.read_text())
        target = (config.get("target_modules") or ["q_proj"])[0]
        write_adapter(tmp_path, {f"layers.0.{target}": factors(r=config.get("r", 8) or 8)})
        shutil.copyfile(path, tmp_path / CONFIG)
        try:
            inspect_adapter(path.stem, tmp_path)
            accepted.add(path.stem.removesuffix("__adapter_config"))
        except AdapterError as error:
            lora = config["peft_type"] == "LORA"
            assert ("use_dora" in str(error) or "kasa" in str(error) or "bdlora" in str(error)) or not lora
            assert lora or repr(config["peft_type"]) in str(error)
    assert len(configs) == 103 and accepted == ACCEPTED
