"""Builds the whole extension against a CUDA torch and imports it; needs nvcc and no GPU.

`python python_tests/csrc/cuda_extension.py` builds `_kernels` and `_C` for one architecture through CMake (minutes, the
first time), imports them, asks whether every op has a CUDA kernel, and enters a digest of what went in in
cuda_checked.json, so that CI builds only what has changed since. The torch and pybind11 are those of `--python`, of
$MOERGE_CUDA_PYTHON, or of the Python that runs this.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import build_tools
import cuda_resources
from cuda_resources import ROOT

NAME = "extension"  # its line in cuda_checked.json
ARCHITECTURE = "90-real"
COMMAND = "MOERGE_CUDA_PYTHON=<a python with a CUDA torch and pybind11> python python_tests/csrc/cuda_extension.py"

# of an interpreter with a CUDA torch; the arguments are the two libraries
IMPORT = """
import importlib.util, sys, torch
kernels, module = sys.argv[1:]
spec = importlib.util.spec_from_file_location("_C", module)
built = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built)
torch.ops.load_library(kernels)
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moerge::")]
lacking = [name for name in sorted(ops) if not has(name, "CUDA")]
if not ops or lacking:
    sys.exit(f"expected a CUDA kernel for each of {len(ops)} ops; there is none for {', '.join(lacking)}")
print(len(ops), "ops with CUDA kernels;", built.build_info())
"""


def went_in() -> list[Path]:
    """The files that make the CUDA build: not csrc/cpu, which every other build compiles, nor the emulator."""
    found = [
        path for folder in ("csrc", "csrc/common", "csrc/cuda") for path in (ROOT / folder).iterdir() if path.is_file()
    ]
    return [ROOT / "CMakeLists.txt", *sorted(found)]


def digest(files: list[Path]) -> str:
    texts = (path.name.encode() + b"\0" + path.read_bytes() for path in files)
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def cuda_python(given: str | None = None) -> str | None:
    """The interpreter to build for, or None when its torch has no CUDA or pybind11 is not there."""
    python = given or os.environ.get("MOERGE_CUDA_PYTHON") or sys.executable
    code = "import pybind11, sys, torch; sys.exit(not torch.version.cuda)"
    return None if subprocess.run([python, "-c", code], capture_output=True).returncode else python


def build(python: str) -> Path:
    """The folder with _kernels.so and _C.so; a later build there compiles only what has changed."""
    compiler = cuda_resources.nvcc()
    assert compiler, "nvcc was not found: put it on PATH, or set CUDACXX"
    folder = ROOT / "build" / "cuda"
    options = [f"-DPython_EXECUTABLE={python}", "-DMOERGE_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURE}"]
    build_tools.cmake(ROOT, folder, options, ["_kernels", "_C"], CUDACXX=compiler)
    return folder / "out"


def import_there(python: str, kernels: Path, module: Path) -> str:
    """What the libraries say of themselves in that Python.

    AssertionError if they do not load there, or an op has no CUDA kernel.
    """
    done = subprocess.run([python, "-c", IMPORT, kernels, module], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def check(python: str) -> str:
    """Builds, imports, and enters the digest."""
    before = digest(went_in())
    out = build(python)
    said = import_there(python, out / "_kernels.so", out / "_C.so")
    assert digest(went_in()) == before, "csrc changed while it was built: run it again"
    cuda_resources.enter(NAME, before)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="with a CUDA torch and pybind11 ($MOERGE_CUDA_PYTHON)")
    python = cuda_python(parser.parse_args().python)
    if python is None:
        sys.exit(f"The torch of this Python has no CUDA, or pybind11 is missing. Run {COMMAND}")
    print(check(python))


if __name__ == "__main__":
    main()
