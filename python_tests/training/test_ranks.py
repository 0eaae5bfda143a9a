"""Two processes on two halves of the data against one process on all of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks_worker as worker
import torch
from safetensors.torch import load_file

from moerge_ext.experts.gates import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.experts import train_expert
from moerge_ext.training.gates import train_gates
from moerge_ext.training.ranks import Ranks, current_ranks

FOLDERS = ("gates", "dropout", "joint", "uneven", "mean", "bad", "resumed", "sharded base", "sharded gates")


def folder_of_experts(folder: Path) -> Path:
    for name in FOLDERS:
        worker.expert(folder / name)
    return folder


def spawned(folder: Path, job: str) -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker.run, (str(folder), port, job), nprocs=worker.RANKS)
    return found(folder, job)


def found(folder: Path, job: str) -> list[dict]:
    return [json.loads((folder / f"{job}.{rank}.json").read_text()) for rank in range(worker.RANKS)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(the folder, what each rank found) of two gloo processes."""
    folder = folder_of_experts(tmp_path_factory.mktemp("ranks"))
    return folder, spawned(folder, "work")


def one(tmp_path, model, data, **options):
    """What one process makes of the data: (result, gates)."""
    folder = worker.expert(tmp_path / "one")
    result = train_gates(model, folder, data, **worker.OPTIONS | options)
    return result, read_gates(options.get("output_dir", folder))["sigmoid-gate"].gates


def assert_same(folder, expected, kind="sigmoid-gate"):
    stored = read_gates(folder)[kind].gates
    assert stored.keys() == expected.keys()
    for path, gate in expected.items():
        assert (stored[path] - gate).norm() / gate.norm() < 1e-5, path


@pytest.mark.slow
def test_gates_are_those_of_the_joint_batch(two, tmp_path):
    folder, ranks = two
    result, gates = one(tmp_path, worker.still(), worker.joint(), validation=worker.data(), eval_every=2)
    assert_same(folder / "gates", gates)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(result.losses, rel=1e-5)
        assert rank["validation"] == pytest.approx(list(result.validation.values()), rel=1e-5)
    assert ranks[0]["gates"] == ranks[1]["gates"]


@pytest.mark.slow
def test_ranks_are_accumulated_batches_also_under_dropout_and_ddp(two, tmp_path):
    folder, _ = two
    assert_same(folder / "dropout", one(tmp_path, worker.Model(), worker.data(), accumulate=2)[1])


@pytest.mark.slow
def test_joint_training_through_a_compiled_wrapper(two, tmp_path):
    folder, _ = two
    options = {"joint": True, "output_dir": tmp_path / "out"}
    assert_same(folder / "out", one(tmp_path, worker.still(), worker.joint(), **options)[1])
    ours, theirs = (load_file(out / "adapter_model.safetensors") for out in (folder / "out", tmp_path / "out"))
    for key, value in theirs.items():
        assert (ours[key] - value).norm() / value.norm() < 1e-5


@pytest.mark.slow
def test_an_expert_is_that_of_the_joint_batch(two, tmp_path):
    options = {"rank": 2, "target_modules": ["first", "second"]}
    train_expert(worker.still(), worker.joint(), tmp_path / "expert", **options, **worker.OPTIONS)
    ours, theirs = (load_file(out / "expert" / "adapter_model.safetensors") for out in (two[0], tmp_path))
    for key, value in theirs.items():
        assert (ours[key] - value).norm() / value.norm() < 1e-5


@pytest.mark.slow
def test_a_module_that_runs_on_one_rank_alone(two, tmp_path):
    folder, _ = two
    batches = [{**batch, "deep": i % 2 == 1} for i, batch in enumerate(worker.data())]
    assert_same(folder / "uneven", one(tmp_path, worker.still(), batches, accumulate=2)[1])


@pytest.mark.slow
def test_average_activation_over_all_ranks(two, tmp_path):
    folder = worker.expert(tmp_path / "one")
    average_activation(worker.still(), folder, worker.data(), progress=False)
    stored = read_gates(folder)["average-activation"]
    assert_same(two[0] / "mean", stored.gates, "average-activation")
    assert read_gates(two[0] / "mean")["average-activation"].metadata == stored.metadata


@pytest.mark.slow
def test_an_error_on_one_rank_is_an_error_on_all(two):
    first, second = two[1]
    assert first["failed"].startswith("ValueError: data ended after 2 batches")
    assert second["failed"].startswith("RuntimeError: another rank failed:\n- rank 0: ValueError: data ended after 2")
    for rank in (first, second):
        assert rank["differ"].startswith("ValueError: gates of bad must be called alike on every rank:\n- lr: 0.1 on")
    assert "moerge_gates.safetensors" not in first["written"]


@pytest.mark.slow
def test_a_killed_run_goes_on(two, tmp_path):
    folder, ranks = two
    assert all("ended after 3 batches" in rank["killed"] for rank in ranks)
    assert_same(folder / "resumed", one(tmp_path, worker.still(), worker.joint())[1])


@pytest.mark.slow
def test_fsdp2(tmp_path):
    folder = folder_of_experts(tmp_path / "ranks")
    ranks = spawned(folder, "sharded")
    assert [rank["kinds"] for rank in ranks] == [["DTensor"]] * 2
    gates = one(tmp_path, worker.still(), worker.joint(), warmup_ratio=0.0)[1]
    assert_same(folder / "sharded gates", gates)
    assert_same(folder / "sharded base", one(tmp_path, worker.still(), worker.joint())[1])


@pytest.mark.slow
def test_torchrun_without_a_process_group(two, tmp_path):
    """The script calls nothing but train_gates and average_activation."""
    folder, tests = folder_of_experts(tmp_path / "ranks"), Path(worker.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker.__file__]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(folder / "gates", read_gates(two[0] / "gates")["sigmoid-gate"].gates)
    assert found(folder, "work")[0]["losses"] == two[1][0]["losses"]


def test_one_process_alone_has_one_rank(monkeypatch):
    assert current_ranks() == Ranks(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a cluster, say; torchrun has not started this
    assert current_ranks() == Ranks(0, 1)
    with pytest.raises(KeyError), Ranks().together():
        raise KeyError
