"""The build: what it reports, and what a user sees when it does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moerge_ext
from moerge_ext.commands import main as cli
from moerge_ext.native import health
from moerge_ext.native import loading as _native

PACKAGE = Path(moerge_ext.__file__).parent


def test_build_info():
    info = moerge_ext.build_info()
    assert info["version"] == moerge_ext.__version__
    assert info["torch"].split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    assert info["cuda"] is bool(info["cuda_architectures"])
    assert torch.version.cuda or not info["cuda"]
    assert "portable" in info["instruction_sets"]
    assert isinstance(info["cpu_capabilities"], list)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Python with `folder` before everything else on its path."""
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=folder)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder with a copy of the installed package, to be damaged."""
    ignore = shutil.ignore_patterns("assets", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "moerge_ext", ignore=ignore)
    return tmp_path


def test_kernels_that_torch_cannot_load(copied):
    """A library full of symbols that this torch lacks is what an upgrade leaves behind."""
    _native_copy = next((copied / "moerge_ext").glob("_kernels*"))
    _native_copy.write_bytes(b"not a library")
    result = run_python(copied, "-c", "import moerge_ext")
    assert result.returncode != 0
    last = result.stderr[result.stderr.rindex("ImportError") :]
    assert f"built against torch {moerge_ext.build_info()['torch']}" in last
    assert f"cannot be loaded into torch {torch.__version__}" in last
    assert "pip install --no-build-isolation" in last

    result = run_python(copied, "-m", "moerge_ext", "doctor")
    assert result.returncode == 1
    assert "PROBLEM" in result.stdout and "pip install --no-build-isolation" in result.stdout


def test_nothing_built(copied):
    for library in (copied / "moerge_ext").glob("_*.so"):
        library.unlink()
    told = run_python(copied, "-c", "import moerge_ext").stderr
    assert "ImportError: moerge_ext:" in told
    assert "Rebuild it against the installed torch" in told or f"the installed package in {PACKAGE}" in told
    assert run_python(copied, "-m", "moerge_ext", "doctor").returncode == 1


def test_an_unbuilt_checkout_that_hides_the_installed_package_is_said(copied, tmp_path_factory):
    """Python looks first in the folder that it is started in, which is the checkout's after an install from there."""
    for library in (copied / "moerge_ext").glob("_*.so"):
        library.unlink()
    installed = tmp_path_factory.mktemp("site") / "moerge_ext"
    installed.mkdir()
    (installed / next(PACKAGE.glob("_kernels*")).name).touch()
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(copied), str(installed.parent)])}
    for words in (["-c", "import moerge_ext"], ["-m", "moerge_ext", "doctor"]):
        told = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, cwd=copied)
        assert told.returncode == 1
        text = told.stdout + told.stderr
        assert f"{copied / 'moerge_ext'} is source that is not built" in text and f"package in {installed}" in text
        assert f"Start Python in another folder (and keep your scripts in one) than {copied}" in text
        assert "Rebuild it" not in text


def test_doctor_is_content_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out and "All fits" in out
    assert re.search(r"^ops +load and run: kernels for (avx512( with (amx|bf16))?|avx2|portable)$", out, re.M)


def test_doctor_names_an_instruction_set_that_is_none():
    words = [sys.executable, "-m", "moerge_ext", "doctor"]
    env = os.environ | {"MOERGE_INSTRUCTION_SET": "sse9"}
    told = subprocess.run(words, capture_output=True, text=True, env=env)
    assert told.returncode == 1 and "got sse9\nUnset it" in told.stdout


def test_doctor_sees_a_version_mismatch(monkeypatch):
    info = moerge_ext.build_info() | {"version": "0.0.1"}
    monkeypatch.setattr(_native, "build_info", lambda: info)
    report = health.examine()
    assert not report.ok and "0.0.1" in report.problems[0][0]


def test_setup_refuses_cuda_it_cannot_build():
    root = PACKAGE.parent
    if not (root / "setup.py").exists():
        pytest.skip("needs the source tree")
    values = [("yes", "must be 0, 1 or unset")]
    if not torch.version.cuda:
        values.append(("1", "has no CUDA"))
    for value, text in values:
        result = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "/nonexistent"],
            capture_output=True, text=True, cwd=root, env=os.environ | {"MOERGE_CUDA": value},
        )  # fmt: skip
        assert result.returncode != 0 and text in result.stderr
