"""Two ranks that share layers out, over gloo, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import builders
import pytest
import torch
from serving_cases import folders

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("method", ("phatgoose", "arrow", "average_activation_mttl", "merged_factors"))
def test_two_ranks_compute_what_one_does(experts, method, tmp_path):
    run(method, experts, tmp_path)


def test_output_biases_are_added_once(tmp_path):
    model = builders.tiny_llama()
    modules = {}
    for name in ("ant", "bee"):
        random = torch.Generator().manual_seed(len(modules))
        parts = {
            path: tuple(torch.randn(*size, generator=random) / 4 for size in ((4, d), (o, 4), (o,)))
            for path, d, o in builders.linear_sizes(model, ("q_proj", "k_proj", "v_proj", "down_proj"))
        }
        modules[name] = builders.write_adapter(tmp_path / name, parts, lora_bias=True)
    run("merged", [str(path) for path in modules.values()], tmp_path)


def run(method: str, experts: list[str], meeting: Path) -> None:
    worker = str(Path(__file__).with_name("served_ranks_worker.py"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), "2", str(meeting / f"met-{method}"), method, *experts],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
