"""The gates sidecar: written in one step, read with every check."""

import os
import shutil

import pytest
import torch
from adapter_cases import UP, Q, good_adapter, refused
from safetensors.torch import save_file

from moerge_ext.experts.formats.peft import AdapterError, read_adapter, read_gates, write_gates
from moerge_ext.files.atomic import write_atomically


@pytest.fixture
def folder(tmp_path):
    return good_adapter(tmp_path / "expert")


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


def test_write_atomically(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def killed(temporary):
        assert temporary.parent == tmp_path and target.read_bytes() == b"old"
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, killed)
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]
    write_atomically(str(target), lambda temporary: temporary.write_bytes(b"new"))
    assert target.read_bytes() == b"new" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="needs the permissions of POSIX")
def test_gates_are_as_readable_as_any_new_file(folder):
    before = os.umask(0o027)
    try:
        path = write_gates(folder, {Q: torch.zeros(8)}, kind="sigmoid-gate")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
