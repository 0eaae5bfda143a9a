"""Finds the compiled parts: `_C` (build facts) and `_kernels` (the ops, a plain library loaded into torch)."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1]  # of the package, where the build puts both
REBUILD = (
    "Rebuild it against the installed torch:\n"
    "    pip install --no-build-isolation --force-reinstall --no-deps .   (in its checkout)\n"
    "`python -m moerge_ext doctor` shows both sides."
)
ELSEWHERE = (
    f"Start Python in another folder (and keep your scripts in one) than {FOLDER.parent}, or build it in place:\n"
    f"    pip install --no-build-isolation --no-deps --editable {FOLDER.parent}"
)


def build_info() -> dict[str, Any]:
    """What was built.

    Keys: version, torch, torch_cuda, cuda, cuda_architectures, compiler, instruction_sets, cpu_capabilities.

    ImportError when the compiled module is missing or is for another Python.
    """
    try:
        return importlib.import_module("moerge_ext._C").build_info()
    except ImportError as error:
        what = f"the compiled module _C cannot be imported ({error}); the package is not built for this Python"
        raise ImportError(_missing(what)) from error


def mend() -> str:
    """What to do where the compiled parts are missing or do not fit."""
    return REBUILD if _hidden() is None else ELSEWHERE


def _hidden() -> Path | None:
    """The built package that an unbuilt checkout hides, as it does from a Python that is started inside of it."""
    if kernels_path() is not None:
        return None
    found = (Path(entry) / FOLDER.name for entry in sys.path)
    return next((folder for folder in found if kernels_path(folder) is not None), None)


def _missing(what: str) -> str:
    if (hidden := _hidden()) is not None:
        what = f"{FOLDER} is source that is not built, and Python finds it before the installed package in {hidden}"
    return f"moerge_ext: {what}.\n{mend()}"


def kernels_path(folder: Path = FOLDER) -> Path | None:
    """The library that holds the ops, or None when it was not built."""
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_kernels{suffix}"
        if path.exists():
            return path
    return None


def load_kernels() -> None:
    """Registers the ops with torch. ImportError names both torch versions and the mend."""
    info = build_info()
    path = kernels_path()
    if path is None:
        raise ImportError(_missing(f"the kernel library _kernels is missing from {FOLDER}"))
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"moerge_ext was built against torch {info['torch']} and cannot be loaded into "
            f"torch {torch.__version__}: {error}\n{REBUILD}"
        ) from error
