"""The CUDA kernels without a GPU: built for the host against the emulator of csrc/simt, which has tests of its own.

By hand, for every op test: `cmake -S . -B build/simt -DMOERGE_SIMT=ON ...` (as `simt_build` below), then
`pytest --simt build/simt/out/_simt.so python_tests/test_ops_*.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OP_TESTS = ("route", "lora", "linear", "16bit", "mix", "autograd", "torch", "cuda")


@pytest.fixture(scope="session")
def simt_build(request):
    """Builds one target of csrc/simt and returns the folder it is in; later runs only build what changed."""
    if request.config.getoption("--simt"):
        pytest.skip("the emulator is in use already")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("needs the source tree")
    if not shutil.which("cmake") or not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("needs cmake and a C++ compiler")

    def build(target: str, sanitize: str = "") -> Path:
        folder = ROOT / "build" / ("simt-sanitized" if sanitize else "simt")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        options = ["-DMOERGE_SIMT=ON", "-DMOERGE_CUDA=OFF", f"-DMOERGE_SIMT_SANITIZE={sanitize}"]
        for command in (
            ["cmake", "-S", ROOT, "-B", folder, *generator, f"-DPython_EXECUTABLE={sys.executable}", *options],
            ["cmake", "--build", folder, "--target", target],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        return folder / "out"

    return build


@pytest.mark.parametrize("sanitize", ["", "address,undefined"], ids=["plain", "sanitized"])
def test_the_emulator_catches_planted_bugs(simt_build, sanitize):
    done = subprocess.run([simt_build("simt_selftest", sanitize) / "simt_selftest"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("0 failed\n"), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("op", OP_TESTS)
def test_op_tests_over_the_emulator(simt_build, op):
    """Every test of an op, forward and backward, with the CUDA kernels in place of the CPU's."""
    library = simt_build("_simt") / "_simt.so"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--simt", library, "-m", "not slow", f"python_tests/test_ops_{op}.py"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "registered at" in done.stderr + done.stdout and "csrc/cuda/bind_" in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "7"])
def test_another_order_of_threads_and_early_copies(simt_build, seed):
    """The kernels that copy asynchronously, in order and in another order, with copies that land at once."""
    library = simt_build("_simt") / "_simt.so"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--simt", library, "python_tests/test_ops_16bit.py", "-k", "shapes"],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"MOERGE_SIMT_SEED": seed, "MOERGE_SIMT_COPIES": "early"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
