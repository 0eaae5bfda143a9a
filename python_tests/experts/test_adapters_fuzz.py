"""Mutated adapters: load_experts raises ValueError or succeeds, in memory that the files justify."""

import json
import os
import struct

import pytest
import torch
from builders import lora_config, write_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moerge_ext.experts.bank import load_experts
from moerge_ext.experts.formats.peft import write_gates

# a mutated pattern often fits no module
pytestmark = pytest.mark.filterwarnings("ignore:load_experts:UserWarning")
Q, UP = "layers.0.q_proj", "layers.0.up_proj"
WEIGHTS, CONFIG, GATES = "adapter_model.safetensors", "adapter_config.json", "moerge_gates.safetensors"
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """({file: bytes} of a good adapter with gates, a folder to rewrite for every example)."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz") / "expert"
    write_adapter(folder, {Q: (torch.randn(2, 8), torch.randn(6, 2)), UP: (torch.randn(2, 8), torch.randn(4, 2))}, r=2)
    write_gates(folder, {Q: torch.randn(8)}, kind="sigmoid-gate")
    return {path.name: path.read_bytes() for path in folder.iterdir()}, folder


@pytest.fixture(autouse=True, scope="module")
def memory_guard():
    """No example may map more than 8 GiB beyond what the process has: an absurd allocation fails at once."""
    resource = pytest.importorskip("resource")
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to know how much memory is mapped")
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(pristine, **changed):
    """Load the adapter with some files replaced; anything but a ValueError fails the test."""
    files, folder = pristine
    for name, content in (files | changed).items():
        (folder / name).write_bytes(content)
    try:
        bank = load_experts({"fuzzed": folder})
    except ValueError as error:
        assert "fuzzed" in str(error)
        return None
    for module in bank.modules.values():
        assert torch.isfinite(module.lora_A).all() and torch.isfinite(module.lora_B).all()
    # a float16 file may be read as float32, and shapes of one tensor may be padded to another's
    assert bank.nbytes <= 8 * sum(len(content) for content in (files | changed).values())
    return bank


def mutate(data: bytes, edits) -> bytes:
    content = bytearray(data)
    for kind, where, value in edits:
        at = int(where * len(content))
        if kind == "set" and content:
            content[min(at, len(content) - 1)] = value
        elif kind == "insert":
            content.insert(at, value)
        elif kind == "delete":
            del content[at : at + value]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "cut"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


def test_the_unchanged_adapter_loads(pristine):
    assert attempt(pristine) is not None


@FUZZ
@given(st.sampled_from([WEIGHTS, CONFIG, GATES]), EDITS)
def test_mutated_bytes(pristine, name, edits):
    attempt(pristine, **{name: mutate(pristine[0][name], edits)})


@FUZZ
@given(st.sampled_from([WEIGHTS, GATES]), EDITS)
def test_mutated_headers(pristine, name, edits):
    """The header alone is edited and its length kept right, so that more of the file is believed."""
    data = pristine[0][name]
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = mutate(data[8:end], edits)
    attempt(pristine, **{name: struct.pack("<Q", len(header)) + header + data[end:]})


SIZES = st.one_of(st.integers(-2, 20), st.integers(0, 1 << 64), st.sampled_from([1 << 50, (1 << 63) - 1]))
KEYS = st.one_of(
    st.sampled_from([f"base_model.model.{Q}.lora_{x}" for x in ("A.weight", "B.weight", "B.bias")]),
    st.sampled_from([f"base_model.model.{Q}.lora_magnitude_vector", Q, "__global__", "__metadata__", ""]),
    st.sampled_from(["lm_head.weight", "a.base_layer.bias", ".modules_to_save.", "x"]).map("base_model.model.".__add__),
    st.text(max_size=12),
)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "C64", "X"]),
        "shape": st.lists(SIZES, max_size=4),
        "data_offsets": st.tuples(SIZES, SIZES).map(list),
    }
)


@FUZZ
@given(st.sampled_from([WEIGHTS, GATES]), st.dictionaries(KEYS, TENSORS, max_size=4), st.integers(0, 256))
def test_invented_headers(pristine, name, tensors, size):
    header = json.dumps(tensors).encode()
    attempt(pristine, **{name: struct.pack("<Q", len(header)) + header + bytes(size)})


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=3), st.integers(1, 9))
def test_consistent_files_with_odd_shapes(pristine, shapes, r):
    """Well-formed safetensors whose shapes do not make an adapter, unless by luck."""
    _, folder = pristine
    tensors = {f"m{i}": (torch.ones(a, 8), torch.ones(6, b)) for i, (a, b) in enumerate(shapes)}
    write_adapter(folder, tensors, r=r)
    bank = attempt(pristine, **{name: (folder / name).read_bytes() for name in (WEIGHTS, CONFIG)} | {GATES: b""})
    assert bank is None


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.one_of(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "lora_bias",
            "bias",
            "init_lora_weights",
        ]
    ),
    st.sampled_from(
        [
            "peft_type",
            "target_modules",
            "auto_mapping",
            "megatron_core",
            "base_model_name_or_path",
            "use_dora",
            "modules_to_save",
            "layers_to_transform",
        ]
    ),
    st.text(max_size=8),
)


@FUZZ
@given(st.dictionaries(FIELDS, JSON_VALUES, min_size=1, max_size=3))
def test_mutated_configs(pristine, fields):
    attempt(pristine, **{CONFIG: json.dumps(lora_config(2) | fields).encode()})


@FUZZ
@given(st.sampled_from(["rank_pattern", "alpha_pattern"]), st.text("aq_.*+?|()[]^$\\bd{}-1,=!<:", max_size=60))
def test_mutated_patterns(pristine, field, key):
    attempt(pristine, **{CONFIG: json.dumps(lora_config(2) | {field: {key: 2}}).encode()})


def test_a_header_that_claims_petabytes(pristine):
    for shape in ([1 << 50], [1 << 25, 1 << 25], [2, 1 << 48]):
        size = 4
        for n in shape:
            size *= n
        header = json.dumps(
            {
                f"base_model.model.{Q}.lora_A.weight": {
                    "dtype": "F32",
                    "shape": shape,
                    "data_offsets": [0, size],
                }
            }
        ).encode()
        assert attempt(pristine, **{WEIGHTS: struct.pack("<Q", len(header)) + header + bytes(64)}) is None
