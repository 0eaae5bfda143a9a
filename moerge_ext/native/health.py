"""What was built, what this machine has, whether they fit, and what to do if not.

Imports neither the ops nor the model code, so that it can speak when those cannot be loaded.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from dataclasses import dataclass, field
from typing import Any

from .._version import __version__

_PACKAGES = ("transformers", "safetensors", "huggingface_hub", "peft", "matplotlib")


@dataclass
class Report:
    """Lines to show, and problems: (what is wrong, what to do)."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def examine() -> Report:
    """Looks at the build and at this machine; never raises."""
    report = Report()
    report.lines.append(("moerge_ext", __version__))
    report.lines.append(("Python", f"{platform.python_version()} ({sys.executable})"))
    torch = _examine_torch(report)
    if torch is not None:
        _examine_build(report, torch)
    for name in _PACKAGES:
        report.lines.append((name, _version(name) or "not installed"))
    return report


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_torch(report: Report) -> Any | None:
    try:
        import torch
    except ImportError as error:
        report.problems.append((f"torch cannot be imported: {error}", 'pip install "torch>=2.10"'))
        return None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report.lines.append(
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}, {torch.get_num_threads()} threads")
    )
    report.lines.append(("GPUs", ", ".join(gpus) or "none visible"))
    report.lines.append(("nvcc", shutil.which("nvcc") or "not on PATH"))
    return torch


def _examine_build(report: Report, torch: Any) -> None:
    from . import loading

    try:
        info = loading.build_info()
    except ImportError as error:
        report.problems.append((str(error).partition("\n")[0], loading.mend()))
        return
    kernels = "CPU and CUDA " + " ".join(info["cuda_architectures"]) if info["cuda"] else "CPU"
    report.lines.append(
        ("built", f"version {info['version']} against torch {info['torch']} by {info['compiler']}: {kernels}")
    )
    report.lines.append(("instruction sets", f"built {', '.join(info['instruction_sets'])}"))
    report.lines.append(("this CPU", ", ".join(info["cpu_capabilities"]) or platform.machine()))
    if info["version"] != __version__:
        report.problems.append(
            (f"the compiled part is version {info['version']}, the Python part {__version__}", loading.REBUILD)
        )
    try:
        loading.load_kernels()
    except ImportError as error:
        report.problems.append((str(error).partition("\n")[0], loading.mend()))
        return
    _try_an_op(report, torch)
    if torch.cuda.is_available() and not info["cuda"]:
        report.lines.append(
            ("note", 'a GPU is visible, and this build has CPU kernels only: models on it need backend="reference"')
        )


def _try_an_op(report: Report, torch: Any) -> None:
    x = torch.arange(12.0, dtype=torch.float32, device="cpu").reshape(2, 6)
    try:
        weights, experts = torch.ops.moerge.route(x, torch.eye(3, 6, dtype=torch.float32, device="cpu"))
        fine = experts.shape == (2, 2) and torch.allclose(
            weights.sum(-1), torch.ones(2, dtype=torch.float32, device="cpu")
        )
    except (RuntimeError, ValueError) as error:
        told = "MOERGE_INSTRUCTION_SET" in str(error)
        mend = "Unset it, or set it to one of these." if told else "Please report this with the lines above."
        report.problems.append((f"the ops load but do not run: {error}", mend))
        return
    if fine:
        report.lines.append(("ops", f"load and run: {_kernels(torch)}"))
    else:
        report.problems.append(("the ops run but give wrong numbers", "Please report this with the lines above."))


def _kernels(torch: Any) -> str:
    """Which instruction set the ops take on this CPU, in their words."""
    shapes = ((1, 4), (1, 4), (2, 4), (2, 1, 4), (2, 4, 1))  # base, x, gates, lora_A, lora_B
    said = torch.ops.moerge.routed_lora_ways(*(torch.ones(s, dtype=torch.float32, device="cpu") for s in shapes))
    return bytes(said.tolist()).decode().strip()
