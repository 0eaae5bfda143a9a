"""Output that nobody reads any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moerge_ext


@pytest.mark.parametrize("words", [["methods", "-v"], ["list", "--json", "."], ["list", "."], ["list", "--help"]])
def test_a_reader_who_has_gone_away(words, tmp_path):
    """`moerge list | head -1` ends quietly, with the status of what SIGPIPE ends; help is shorter than a pipe holds."""
    with subprocess.Popen(
        [sys.executable, "-m", "moerge_ext", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(moerge_ext.__file__).parents[1])},
    ) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
        status = process.wait(timeout=300)
    assert said == "" and status in (141, *([0] if "--help" in words else [])), said
