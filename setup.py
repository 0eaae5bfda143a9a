"""Driver of the native build: decides CPU or CUDA, then hands over to CMake, which holds sources and flags."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MEND = """\
moerge_ext is compiled against the torch that is installed, so its build needs, in this environment:
    pip install "torch>=2.10" setuptools wheel cmake ninja pybind11
    pip install --no-build-isolation .
(--no-build-isolation lets the build see that torch.)"""


def require_torch():
    """The installed torch and pybind11, or an end with the mend."""
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        sys.exit(f"moerge_ext: {error}.\n{MEND}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        sys.exit(f"moerge_ext: needs torch >= 2.10, found {torch.__version__}.\n{MEND}")
    return torch


def wants_cuda(torch) -> bool:
    """Whether to build CUDA kernels: when torch has CUDA and nvcc is found, whether a GPU is visible or not.

    MOERGE_CUDA=0 or 1 decides instead; 1 ends with the reason where it cannot be done.
    """
    wish = os.environ.get("MOERGE_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"moerge_ext: MOERGE_CUDA must be 0, 1 or unset, got {wish!r}")
    lacking = None
    if not torch.version.cuda:
        lacking = f"torch {torch.__version__} has no CUDA"
    elif not (os.environ.get("CUDACXX") or shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        lacking = "nvcc was not found (put it on PATH, or set CUDACXX)"
    if wish == "1" and lacking:
        sys.exit(f"moerge_ext: MOERGE_CUDA=1 asks for CUDA kernels, and {lacking}.")
    build = wish != "0" and not lacking
    why = "" if build else f" ({'MOERGE_CUDA=0' if wish == '0' else lacking})"
    print(f"moerge_ext: building {'CPU and CUDA' if build else 'CPU'} kernels for torch {torch.__version__}{why}")
    return build


class CMakeBuild(build_ext):
    """Builds every extension with one CMake run and copies each to the place setuptools wants."""

    def run(self) -> None:
        torch = require_torch()
        cuda = wants_cuda(torch)
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit(f"moerge_ext: cmake was not found on PATH.\n{MEND}")
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        subprocess.run(
            [
                cmake,
                "-S",
                str(ROOT),
                "-B",
                str(build_dir),
                *generator,
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DMOERGE_CUDA={'ON' if cuda else 'OFF'}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_suffix(".new")
            shutil.copyfile(build_dir / "out" / (extension.name.rpartition(".")[2] + ".so"), fresh)
            os.replace(fresh, target)  # a process that has the old library mapped keeps it

    def get_source_files(self) -> list[str]:
        return []


setup(
    ext_modules=[Extension("moerge_ext._C", []), Extension("moerge_ext._kernels", [])],
    cmdclass={"build_ext": CMakeBuild},
)
