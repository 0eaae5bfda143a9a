"""`moerge eval --engine vllm` with the real vLLM: `make test-serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server_cases import tiny
from serving_cases import NAMES

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="needs vLLM: make test-serve")

METHODS = "base,phatgoose,arrow,merged,expert:dog,phatgoose/top_k=1"


def task(folder: Path, metric: str, rows: int = 24) -> Path:
    folder.mkdir()
    choices = ["w10", "w20 w21", "w30"]
    lines = [{"input": f"w{3 + i} w{90 - i} w{5 + 2 * i}", "target": choices[i % 3]} for i in range(rows)]
    (folder / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {"task": folder.name, "split": "heldout", "metric": metric}
    meta |= {"choices": choices} if metric == "rank" else {}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def evaluated(output: Path, *words: str) -> dict[tuple[str, str], list[dict]]:
    """{(task, run): the answers} of a command in a process of its own."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    words = (sys.executable, "-m", "moerge_ext", "eval", "--no-progress", "--output", str(output), *words)
    made = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=1800)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    found = {}
    for path in (output / "answers").rglob("*.jsonl"):
        head, *lines = map(json.loads, path.read_text().splitlines())
        found[path.parent.name, head["settings"]["run"]] = [line for line in lines if "answer" in line]
    return found


def test_the_table_of_the_patched_model(tmp_path):
    """Generated answers and choices, of two engines one after another (a method twice, with other options)."""
    model, experts = tiny(tmp_path, NAMES)
    tasks = [str(task(tmp_path / name, metric)) for name, metric in (("write", "exact_match"), ("choose", "rank"))]
    words = ["--model", str(model), "--experts", *experts, "--tasks", *tasks, "--methods", METHODS]
    words += ["--max-new-tokens", "8"]
    plain = evaluated(tmp_path / "torch", *words)
    served = evaluated(tmp_path / "vllm", *words, "--engine", "vllm", "--engine-option", "enforce_eager=true")
    assert served.keys() == plain.keys() and len(plain) == 2 * len(METHODS.split(","))
    for key, rows in plain.items():
        assert [row["answer"] for row in served[key]] == [row["answer"] for row in rows], key
        for mine, other in zip(served[key], rows, strict=True):
            if "log_likelihoods" in other:
                assert mine["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)
    written = {run: [row["answer"] for row in rows] for (name, run), rows in plain.items() if name == "write"}
    assert len({tuple(texts) for texts in written.values()}) == len(written), "every run says something else"
