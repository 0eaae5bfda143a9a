"""A model that transformers has shared out over two ranks by its features, patched."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import builders

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ROOT = Path(__file__).parents[2]


def test_two_ranks_compute_what_one_does(tmp_path):
    model = builders.tiny_llama()
    model.save_pretrained(tmp_path / "model")
    made = builders.random_experts(model, tmp_path / "experts", ("ant", "bee", "cat"), LINEARS)
    said = run(str(tmp_path / "model"), *map(str, made.values()))
    assert [code for code, _ in said] == [0, 0], "\n".join(text for _, text in said)


def run(*arguments: str) -> list[tuple[int, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = str(Path(__file__).with_name("tensor_parallel_worker.py"))
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, worker, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=600)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text[-3000:]) for process, text in zip(started, said, strict=True)]
