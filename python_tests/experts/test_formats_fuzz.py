"""Mutated adapters of every format: ValueError or success, in memory that the files justify."""

import json
import struct

import pytest
import torch
from adapter_cases import factors
from builders import bottleneck_expert, ia3_expert, tiny_llama, write_adapter
from format_cases import ADAPTER, gguf_bytes, gguf_tensors, write_gguf, write_mlx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapters_fuzz import EDITS, FUZZ, JSON_VALUES, SIZES, memory_guard, mutate  # noqa: F401  (a fixture)
from test_formats import as_pickle, in_parts

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.convert import convert_adapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FEWER = settings(FUZZ, max_examples=60)  # each of several formats
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
BASE = {"hidden_size": 8, "num_attention_heads": 3, "num_key_value_heads": 1}


def small():
    return {Q: factors(r=2), UP: factors(8, 4, 2)}


def write_adalora(folder):
    write_adapter(folder, small(), r=2, peft_type="ADALORA", init_r=4)
    stored = load_file(folder / "adapter_model.safetensors")
    tensors = {key.removesuffix(".weight"): value for key, value in stored.items()}
    tensors |= {key[:-1] + "E": torch.ones(2, 1) for key in tensors if key.endswith("A")}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


WRITERS = {
    "adalora": write_adalora,
    "mlx": lambda folder: write_mlx(folder, small()),
    "gguf": lambda folder: write_gguf(folder / "a.gguf", small(), "llama", heads=(3, 1)).parent,
    "parts": lambda folder: in_parts(write_adapter(folder, small(), r=2)),
    "pickle": lambda folder: as_pickle(write_adapter(folder, small(), r=2)),
    "ia3": lambda folder: ia3_expert(tiny_llama(), folder, inputs=()),
    "bottleneck": lambda folder: bottleneck_expert(tiny_llama(), folder),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """{format: ({file: bytes} of a good adapter, a folder to rewrite for every example)}."""
    torch.manual_seed(0)
    made = {}
    for name, write in WRITERS.items():
        folder = write(tmp_path_factory.mktemp("fuzz") / name)
        made[name] = ({path.name: path.read_bytes() for path in folder.iterdir()}, folder)
    return made


def attempt(pristine, name, **changed):
    """Load (or convert) the adapter with some files replaced; anything but a ValueError fails the test."""
    files, folder = pristine[name]
    for file, content in (files | changed).items():
        (folder / file).write_bytes(content)
    output = folder.parent / "out"
    try:
        source = convert_adapter(folder, output, allow_pickle=True) if name == "pickle" else folder
        bank = load_experts({"fuzzed": source}, base=BASE)
    except ValueError as error:
        assert str(error)
        return None
    finally:
        for file in output.glob("*"):
            file.unlink()
    for module in bank.modules.values():
        assert torch.isfinite(module.lora_A).all() and torch.isfinite(module.lora_B).all()
    assert bank.nbytes <= 16 * sum(len(content) for content in (files | changed).values())
    return bank


@pytest.mark.parametrize("name", WRITERS)
def test_the_unchanged_adapter_loads(pristine, name):
    assert attempt(pristine, name) is not None


@FEWER
@given(st.sampled_from(list(WRITERS)), st.floats(0, 0.999), EDITS)
def test_mutated_bytes(pristine, name, which, edits):
    files = sorted(pristine[name][0])
    file = files[int(which * len(files))]
    attempt(pristine, name, **{file: mutate(pristine[name][0][file], edits)})


@FEWER
@given(EDITS, st.integers(0, 400))
def test_mutated_gguf_headers(pristine, edits, end):
    """Near the start, where the lengths stand."""
    data = pristine["gguf"][0]["a.gguf"]
    attempt(pristine, "gguf", **{"a.gguf": mutate(data[:end], edits) + data[end:]})


KINDS = st.tuples(st.lists(st.integers(0, 1 << 64 - 1), min_size=1, max_size=4).map(tuple), st.integers(0, 45))
VALUES = st.one_of(st.text(max_size=12), st.floats(width=32), st.lists(st.text(max_size=4), max_size=3))
KEYS = ["general.architecture", "general.type", "adapter.type", "adapter.lora.alpha", "general.alignment"]


@FEWER
@given(
    st.dictionaries(st.sampled_from(list(gguf_tensors({Q: (0, 0), UP: (0, 0)}))), KINDS, max_size=3),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
def test_invented_gguf_headers(pristine, kinds, values):
    tensors = gguf_tensors(small())
    facts = ADAPTER | {"general.architecture": "qwen2", "adapter.lora.alpha": 4.0} | values
    raw = {key: tensor.contiguous().numpy().tobytes() if key in kinds else tensor for key, tensor in tensors.items()}
    kinds = {key: (tuple(min(size, (1 << 64) - 1) for size in shape), kind) for key, (shape, kind) in kinds.items()}
    attempt(pristine, "gguf", **{"a.gguf": gguf_bytes(raw, facts, kinds)})


@FEWER
@given(SIZES.filter(lambda n: 0 <= n < 1 << 64), SIZES.filter(lambda n: 0 <= n < 1 << 64), st.binary(max_size=200))
def test_invented_gguf_counts(pristine, tensors, pairs, rest):
    attempt(pristine, "gguf", **{"a.gguf": b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest})


@FEWER
@given(st.dictionaries(st.sampled_from(["scale", "rank", "alpha", "keys"]), JSON_VALUES, max_size=3), JSON_VALUES)
def test_mutated_mlx_configs(pristine, parameters, other):
    config = {"lora_parameters": parameters, "model": other}
    attempt(pristine, "mlx", **{"adapter_config.json": json.dumps(config).encode()})
    attempt(pristine, "mlx", **{"adapter_config.json": json.dumps({"lora_parameters": other}).encode()})


@FEWER
@given(JSON_VALUES)
def test_mutated_indices(pristine, value):
    for index in (value, {"weight_map": value}):
        attempt(pristine, "parts", **{"model.safetensors.index.json": json.dumps(index).encode()})


FIELDS = ["config", "model_type", "peft_type", "scaling", "non_linearity", "original_ln_before", "feedforward_modules"]


@FEWER
@given(st.sampled_from(["ia3", "bottleneck"]), st.sampled_from(FIELDS), JSON_VALUES)
def test_mutated_configs_of_experts_that_are_no_lora(pristine, name, field, value):
    config = json.loads(pristine[name][0]["adapter_config.json"])
    inside = isinstance(config.get("config"), dict) and field in config["config"]
    changed = config | ({"config": config["config"] | {field: value}} if inside else {field: value})
    attempt(pristine, name, **{"adapter_config.json": json.dumps(changed).encode()})
