"""MOERGE_LOG_CALLS and the replay of a call that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moerge_ext
from moerge_ext import ops
from moerge_ext.ops import replay
from moerge_ext.ops.calls import Watched, watched

OP = torch.ops.moerge.route.default


def test_nothing_is_watched_unless_asked(monkeypatch):
    monkeypatch.delenv("MOERGE_LOG_CALLS", raising=False)
    assert watched(OP) is OP and ops.ROUTED_LORA_ is torch.ops.moerge.routed_lora_.default


def test_calls_are_printed(capsys):
    x, gates = torch.randn(4, 8), torch.randn(8, 3).T
    weights, experts = Watched(OP, "shapes")(x, gates, 2)
    assert torch.equal(experts, ops.route(x, gates)[1])
    said = capsys.readouterr().err
    assert said.startswith("moerge::route(x float32 [4, 8], gates float32 [3, 8] strides (1, 3), top_k=2) took ")
    with pytest.raises(RuntimeError):
        Watched(OP, "shapes")(x, gates, 9)
    assert "top_k=9) failed " in capsys.readouterr().err


def test_a_failed_call_is_kept_and_made_again(tmp_path, capsys):
    """With the strides and values it had; 1 while it fails, 0 where it does not."""
    file = tmp_path / "call.pt"
    x, gates = torch.randn(4, 8), torch.randn(8, 3).T
    kept = Watched(OP, str(file))
    kept(x, gates, 2)
    assert not file.exists()
    with pytest.raises(RuntimeError, match="top_k"):
        kept(x, gates, 9)
    assert replay.read(file)["args"][1].stride() == (1, 3) and torch.equal(replay.read(file)["args"][0], x)
    assert replay.main([str(file)]) == 1
    assert "it fails again: moerge::route: top_k must be" in capsys.readouterr().out
    torch.save(replay.read(file) | {"args": [x, gates, 2]}, file)
    assert replay.main([str(file)]) == 0
    assert "top_k=2)\nsucceeds here" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a call", None])
def test_what_is_no_kept_call(content, tmp_path, capsys):
    file = tmp_path / "call.pt"
    if content is None:
        torch.save({"op": "exit"}, file)
    else:
        file.write_bytes(content)
    assert replay.main([str(file)]) == 2
    assert "MOERGE_LOG_CALLS=FILE" in capsys.readouterr().err


def test_the_environment_asks_for_it(tmp_path):
    """Also of a routed layer, whose short way does not go through the wrappers."""
    code = """
import torch, moerge_ext
from moerge_ext import ops
from moerge_ext.routing.routed_linear import RoutedLinear
ops.ROUTED_LORA_(torch.randn(2, 8), torch.randn(2, 8), torch.randn(3, 8), torch.randn(3, 4, 8), torch.randn(3, 8, 4), 2)
try:
    ops.mix_log_probs(torch.randn(2, 3, 4), torch.randn(3, 9))
except ValueError as error:
    print(error)
"""
    for wish in ("shapes", str(tmp_path / "call.pt")):
        root = str(Path(moerge_ext.__file__).parents[1])
        env = os.environ | {"MOERGE_LOG_CALLS": wish, "PYTHONPATH": root}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0 and "moerge::mix_log_probs: " in done.stdout, done.stderr
        assert ("moerge::routed_lora_(base float32 [2, 8], " in done.stderr) == (wish == "shapes")
    assert replay.read(tmp_path / "call.pt")["op"] == "mix_log_probs"
