"""What load_experts says of experts that load and are of no use, or of a size that nobody meant."""

from __future__ import annotations

import warnings

import pytest
import torch
from adapter_cases import UP, Q, factors, write_adapter

from moerge_ext.experts import memory
from moerge_ext.experts.bank import load_experts


def zeros_in_b(d=8, o=6, r=4):
    return torch.randn(r, d), torch.zeros(o, r)


def test_an_expert_that_changes_nothing(tmp_path):
    write_adapter(tmp_path / "a", {Q: factors(), UP: factors(8, 12)})
    write_adapter(tmp_path / "b", {Q: zeros_in_b(), UP: zeros_in_b(8, 12)})
    write_adapter(tmp_path / "c", {Q: factors(), UP: (torch.zeros(4, 8), torch.randn(12, 4))})
    write_adapter(tmp_path / "d", {Q: factors(), UP: factors(8, 12)}, alpha=0)
    write_adapter(tmp_path / "e", {Q: factors()})
    with pytest.warns(UserWarning) as caught:
        load_experts([tmp_path / name for name in "abcde"])
    (message,) = [str(warning.message) for warning in caught]
    assert "expert 'b' changes nothing in 2 of 2 modules" in message
    assert f"expert 'c' changes nothing in 1 of 2 modules (lora_B lora_A is 0, such as {UP})" in message
    assert "expert 'd' changes nothing in 2 of 2 modules" in message
    assert "'a'" not in message and "'e'" not in message


def test_a_bias_changes_something(tmp_path):
    write_adapter(tmp_path / "a", {Q: (*zeros_in_b(), torch.ones(6))}, lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_experts(tmp_path / "a")


@pytest.fixture
def one_large(tmp_path):
    """Seven experts of rank 2 and one of rank 64, D = 64, O = 64."""
    ranks = {f"e{i}": 2 for i in range(7)} | {"big": 64}
    return {
        name: write_adapter(tmp_path / name, {Q: factors(64, 64, r), UP: factors(64, 64, r)}, r=r)
        for name, r in ranks.items()
    }


def test_a_bank_that_does_not_fit_is_refused_with_figures(one_large, monkeypatch):
    """One large rank among small ones pads all: bytes needed and free, who is to blame, the ways out."""
    size = load_experts(one_large).nbytes
    assert size == 8 * 64 * 128 * 4 * 2
    monkeypatch.setattr(memory, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError) as caught:
        load_experts(one_large)
    message = str(caught.value)
    for text in (
        f"{size} and {size - 1} bytes",
        "0.5 MiB",
        "64 of 'big'",
        "7 times",
        "without it it takes 0.0 MiB",
        "names=",
    ):
        assert text in message, (text, message)
    assert load_experts(one_large, dtype=torch.bfloat16).nbytes == size // 2
    assert len(load_experts(one_large, names=[f"e{i}" for i in range(7)])) == 7
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    load_experts(one_large)


def test_experts_of_one_rank_blame_nobody(tmp_path, monkeypatch):
    folders = {name: write_adapter(tmp_path / name, {Q: factors()}) for name in "ab"}
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    with pytest.raises(ValueError, match=r"448 and 1 bytes\)\. Ways out: fewer experts"):
        load_experts(folders)


def test_padding_that_fits_is_said(one_large, monkeypatch):
    monkeypatch.setattr(memory, "NOTED_BYTES", 1000)
    with pytest.warns(
        UserWarning, match=r"the bank takes 0.5 MiB: all 8 experts are padded to the largest rank, 64 of 'big'"
    ):
        load_experts(one_large)


def test_memory_of_this_machine(tmp_path, monkeypatch):
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or free > 1 << 20
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory._left_of_limit() is None
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 5\ninactive_file 50",
    }.items():
        (tmp_path / name).write_text(text)
    assert memory._left_of_limit() == 350
    (tmp_path / "memory.max").write_text("max")
    assert memory._left_of_limit() is None
