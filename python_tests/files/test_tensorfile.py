"""Tensors read from their places: every type, parts, and files that change between the check and the reading."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from moerge_ext.files.safefile import open_tensors, read_headers, read_tensor

FILE = "adapter_model.safetensors"
TYPES = [getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "bool", "uint8", "int8")]
TYPES += [torch.int64, torch.float8_e4m3fn, torch.float8_e5m2]
# which safetensors 0.5 does not write
TYPES += [dtype for dtype in (torch.uint16, torch.complex64) if dtype in safetensors.torch._SIZE]


def test_every_type_and_shape(tmp_path):
    """As the library reads it; 8-bit floats widened."""
    tensors = {f"{dtype}": torch.arange(6).reshape(3, 2).to(dtype) for dtype in TYPES}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(3.5)}
    save_file(tensors, tmp_path / FILE, {"a": "b"})
    with open_tensors(tmp_path / FILE) as opened:
        headers = read_headers(opened)
        assert opened.metadata() == {"a": "b"} and headers.keys() == tensors.keys()
        for key, expected in tensors.items():
            found = read_tensor(opened, key, headers[key])
            wanted = expected.bfloat16() if "float8" in key else expected
            assert found.dtype == wanted.dtype and torch.equal(found, wanted), key
        assert torch.equal(opened.rows("torch.bfloat16", 1, 3), tensors["torch.bfloat16"][1:3])
        assert torch.equal(opened.rows("torch.int64", -1, 9), tensors["torch.int64"][-1:])


def test_what_one_reader_does_with_the_texts_is_not_seen_by_the_next(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / FILE, {"kind": "x"})
    for _ in range(2):
        with open_tensors(tmp_path / FILE) as opened:
            assert opened.metadata().pop("kind") == "x"


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_after_its_check(tmp_path, left):
    """A mapping would end the process (SIGBUS)."""
    path = tmp_path / FILE
    save_file({"a": torch.ones(4096), "b": torch.ones(4096)}, path)
    with open_tensors(path) as opened:
        headers = read_headers(opened)
        os.truncate(path, os.path.getsize(path) - 1 if left < 0 else left)
        with pytest.raises(ValueError, match="b cannot be read: the file ends within it"):
            read_tensor(opened, "b", headers["b"])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        open_tensors(path)


def test_a_file_that_is_replaced_while_it_is_open(tmp_path):
    """What was opened is read; a writer in one step (`write_atomically`) never mixes two files."""
    path = tmp_path / FILE
    save_file({"a": torch.ones(3)}, path)
    with open_tensors(path) as opened:
        save_file({"b": torch.zeros(5)}, tmp_path / "new")
        os.replace(tmp_path / "new", path)
        assert read_tensor(opened, "a", opened.headers["a"]).tolist() == [1, 1, 1]
    with open_tensors(path) as opened, pytest.raises(ValueError, match="a changed while it was being read"):
        read_tensor(opened, "a", read_headers(opened).get("b"))


@pytest.mark.parametrize("start", [-4, 8, 1 << 40])
def test_places_are_held_against_the_file_that_is_open(tmp_path, monkeypatch, start):
    """The library checks the path, behind which another file may lie by then: nothing is read outside of this one."""
    from moerge_ext.files import tensorfile

    good, bad = tmp_path / "good", tmp_path / FILE
    save_file({"a": torch.ones(3)}, good)
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [start, start + 12]}}).encode()
    bad.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    check = tensorfile.safe_open
    monkeypatch.setattr(tensorfile, "safe_open", lambda path, **options: check(good, **options))
    with pytest.raises(ValueError, match="a tensor lies outside the file"):
        open_tensors(bad)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}).encode()
    bad.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(ValueError, match="not the size that its shape asks for"):
        open_tensors(bad)


def test_equal_headers_are_not_mixed_up_with_others(tmp_path):
    """What is known of a header is known of a file of that size alone."""
    path = tmp_path / FILE
    save_file({"a": torch.ones(3)}, path)
    with open_tensors(path) as opened:
        assert opened.read("a").sum() == 3
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        open_tensors(path)
