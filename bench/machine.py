"""What this machine is and can do: its name, versions and cache; the bandwidth and rate that the floors are made of."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import moerge_ext
from moerge_ext.native import loading as _native

REPO = Path(__file__).resolve().parents[1]
# what a result depends on, apart from the code of the benchmark's reports
SOURCES = ("csrc", "moerge_ext", "bench/*.py", "CMakeLists.txt", "setup.py")
_NOISE = r"\((r|tm)\)|\b(intel|amd|nvidia|genuine|processor|cpu|\d+-core|with radeon graphics)\b|@"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug(model: str) -> str:
    """A file name from a processor's name: "Intel(R) Xeon(R) Processor @ 2.50GHz" -> "xeon-2.5ghz"."""
    name = re.sub(_NOISE, " ", model.lower())
    name = re.sub(r"(\d+\.\d*?)0+(ghz)", r"\1\2", name).replace(".ghz", "ghz")
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.") or "unknown"


@cache
def cpu_model() -> str:
    """The processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    if found:
        return found.group(1)
    import platform

    return f"{platform.system()} {platform.machine()}"


def machine_name(device: torch.device) -> str:
    """Names the results file: the GPU's model, or the CPU's with its cores and what holds it back; no host name."""
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    held = os.environ.get("MOERGE_INSTRUCTION_SET", "")
    return f"{slug(cpu_model())}-{cores()}c" + (f"-{held}" if held else "")


def last_level_cache(device: torch.device) -> int:
    """Bytes; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


def _git(*args: str) -> str:
    """What git says; empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(REPO), *args], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def commit() -> str:
    """Short commit; "-dirty" when a source it depends on has changes (results and READMEs do not count)."""
    return (_git("rev-parse", "--short=10", "HEAD") or "unknown") + (
        "-dirty" if _git("status", "--porcelain", "--", *SOURCES) else ""
    )


@cache
def build_digest() -> str:
    """Eight hex digits over the package's Python and compiled code: tells two dirty trees apart."""
    package = Path(moerge_ext.__file__).parent
    digest = hashlib.sha256()
    kernels = _native.kernels_path()
    for path in [*sorted(package.glob("*.py")), *sorted(package.glob("methods/*.py")), *([kernels] if kernels else [])]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def keep_memory() -> None:
    """Has glibc keep what is freed, for good.

    It gives large pieces back to the system, whose pages then fault in again, at other moments for every candidate: a
    prefill of SmolLM2 takes 30,000 to 90,000 faults or none, up to a tenth of its time.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def environment(device: torch.device) -> dict[str, Any]:
    """The fields that every row carries."""
    if device.type == "cuda":
        isa = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    else:
        isa = "+".join(_native.build_info()["cpu_capabilities"]) or torch.backends.cpu.get_cpu_capability().lower()
    return {
        "machine": machine_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "isa": isa,
        "commit": commit(),
        "build": build_digest(),
        "torch": torch.__version__,
        "moerge": moerge_ext.__version__,
        "peft": version("peft"),
        "transformers": version("transformers"),
    }


def _best(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Shortest seconds of several calls: the machine's ability, not its load."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def _bandwidth(device: torch.device, count: int) -> float:
    """Bytes per second over `count` floats, the best of reading and of copying."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    read = source.nbytes / _best(source.sum, device, 5)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), device, 5)
    return max(read, copy)


@torch.no_grad()
def measure(device: torch.device, *, small: bool = False) -> dict[str, float]:
    """Memory bandwidth in GB/s and GEMM rate in GFLOP/s per dtype (float16 only on a GPU)."""
    count = 2**20 if small else max(2**26, last_level_cache(device))
    out = {"bandwidth": round(_bandwidth(device, count) / 1e9, 2)}
    cuda = device.type == "cuda"
    n = 128 if small else (8192 if cuda else 1536)
    for dtype in (torch.float32, torch.bfloat16, *([torch.float16] if cuda else [])):
        a = torch.randn(n, n, device=device).to(dtype)
        b = torch.randn(n, n, device=device).to(dtype)
        out[str(dtype).removeprefix("torch.")] = round(2 * n**3 / _best(lambda a=a, b=b: a @ b, device, 4) / 1e9, 1)
    return out
