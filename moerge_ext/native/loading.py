"""Finds the compiled parts: `_C` (build facts) and `_kernels` (the ops, a plain library loaded into torch)."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1]  # of the package, where the build puts both
REBUILD = (
    "Rebuild it against the installed torch:\n"
    "    pip install --no-build-isolation --force-reinstall --no-deps moerge_ext   "
    "(or: pip install --no-build-isolation . in a checkout)\n"
    "`python -m moerge_ext doctor` shows both sides."
)


def build_info() -> dict[str, Any]:
    """What was built.

    Keys: version, torch, torch_cuda, cuda, cuda_architectures, compiler, instruction_sets, cpu_capabilities.

    ImportError when the compiled module is missing or is for another Python.
    """
    try:
        return importlib.import_module("moerge_ext._C").build_info()
    except ImportError as error:
        raise ImportError(
            f"moerge_ext: the compiled module _C cannot be imported ({error}); the package is not built "
            f"for this Python.\n{REBUILD}"
        ) from error


def kernels_path() -> Path | None:
    """The library that holds the ops, or None when it was not built."""
    folder = FOLDER
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
        raise ImportError(f"moerge_ext: the kernel library _kernels is missing from {FOLDER}.\n{REBUILD}")
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"moerge_ext was built against torch {info['torch']} and cannot be loaded into "
            f"torch {torch.__version__}: {error}\n{REBUILD}"
        ) from error
