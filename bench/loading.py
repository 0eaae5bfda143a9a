"""The suite loading: many adapters of one model from their folders, beside PEFT's load_adapter of the same folders.

Seconds to read them (`safetensors.torch.load_file` of the same files is the yardstick), to patch the model with them,
and the peak of memory; page cache warm, bfloat16, alpha = 2 R. Every candidate has a process of its own; PEFT, which
takes long, loads the first few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .model_build import SIZES, TARGETS, llama
from .model_memory import reset, status
from .results import Recorder

DTYPE = torch.bfloat16
WEIGHTS = "adapter_model.safetensors"
ROUNDS = 3  # of load_file and load_experts in turns


@dataclass(frozen=True)
class Load:
    """`adapters` of rank R for the model of a size; PEFT loads the first `peft`."""

    size: str
    adapters: int
    rank: int
    peft: int

    def facts(self) -> dict[str, Any]:
        size = SIZES[self.size]
        return {"size": self.size, "E": self.adapters, "R": self.rank, "dtype": "bfloat16", "modules": size.modules}


LOADS = {"tiny": Load("tiny", 3, 2, 2), "quick": Load("real", 100, 16, 5)}


def write_adapters(load: Load, root: Path) -> list[Path]:
    """The PEFT folders, below root."""
    from safetensors.torch import save_file

    model = llama(SIZES[load.size], DTYPE, torch.device("meta"))
    layers = {path: layer for path, layer in model.named_modules() if path.rpartition(".")[2] in TARGETS}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": load.rank, "lora_alpha": 2 * load.rank}
    config |= {"target_modules": list(TARGETS), "bias": "none", "base_model_name_or_path": "model"}
    folders = [root / f"e{e:03d}" for e in range(load.adapters)]
    for e, folder in enumerate(folders):
        make, tensors = torch.Generator().manual_seed(e), {}
        for path, layer in layers.items():
            key = f"base_model.model.{path}.lora"
            tensors[f"{key}_A.weight"] = torch.randn(load.rank, layer.in_features, generator=make).to(DTYPE)
            tensors[f"{key}_B.weight"] = torch.randn(layer.out_features, load.rank, generator=make).to(DTYPE)
        folder.mkdir()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folders


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def speed(load: Load, folders: list[Path]) -> dict[str, dict[str, Any]]:
    """load_file and load_experts in turns; the round whose ratio is the median."""
    from safetensors.torch import load_file

    from moerge_ext import load_experts

    rounds = []
    for _ in range(ROUNDS):
        read = _seconds(lambda: [load_file(folder / WEIGHTS) and None for folder in folders])[0]
        rounds.append((read, _seconds(lambda: load_experts(folders) and None)[0]))
    read, took = sorted(rounds, key=lambda pair: pair[1] / pair[0])[len(rounds) // 2]
    return {"load_file": {"seconds": read}, "load_experts": {"seconds": took}}


def ours(load: Load, folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Seconds of patch (the gates set before), and the peak of both beyond the base model, over the bank's bytes."""
    import moerge_ext

    base, before = _base(load)
    experts = moerge_ext.load_experts(folders)
    peak = status("VmHWM") - before  # without the gates, which adapters of today do not have
    bank = experts.nbytes / 2**20
    for module in experts.modules.values():
        module.gates["sigmoid-gate"] = torch.randn(len(experts), module.in_features)
        module.has_gate["sigmoid-gate"] = torch.ones(len(experts), dtype=torch.bool)
    gates = experts.nbytes / 2**20 - bank
    seconds = _seconds(lambda: moerge_ext.patch(base, experts, "phatgoose", top_k=2))[0]
    peak = max(peak, status("VmHWM") - before - 2 * gates)  # patch copies the gates
    return {"patch": {"seconds": seconds, "peak_mib": peak, "bank_mib": bank}}


def peft(load: Load, folders: list[Path]) -> dict[str, dict[str, Any]]:
    """PeftModel with the first adapters."""
    from peft import PeftModel

    base, before = _base(load)
    begin = time.perf_counter()
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="e0", autocast_adapter_dtype=False)
    for e, folder in enumerate(folders[1 : load.peft], 1):
        model.load_adapter(folder, adapter_name=f"e{e}", autocast_adapter_dtype=False)
    seconds = time.perf_counter() - begin
    stored = sum((folder / WEIGHTS).stat().st_size for folder in folders[: load.peft]) / 2**20
    return {
        "peft": {"seconds": seconds, "peak_mib": status("VmHWM") - before, "bank_mib": stored, "adapters": load.peft}
    }


def _base(load: Load) -> tuple[torch.nn.Module, float]:
    """(the model, MiB in use with it)"""
    base = llama(SIZES[load.size], DTYPE, torch.device("cpu"))
    return base, reset(torch.device("cpu"))


WORK = {"speed": speed, "ours": ours, "peft": peft}


def main(kind: str, name: str, root: str, threads: str) -> None:
    """Prints {candidate: row}."""
    torch.set_num_threads(int(threads))
    print(json.dumps(WORK[kind](LOADS[name], sorted(Path(root).iterdir()))))


def run(name: str, recorder: Recorder) -> None:
    """Measures what is not recorded yet."""
    load = LOADS[name]
    cell = {"suite": "loading", "mode": "load"} | load.facts()
    if recorder.has(cell):
        print("loading: recorded already")
        return
    rows = []
    with tempfile.TemporaryDirectory() as root:
        write_adapters(load, Path(root))
        for kind in WORK:
            rows += _measured(kind, name, root)
    recorder.add(cell, rows)
    for row in rows:
        print(f"    {row['candidate']:<14} {row.get('seconds', row.get('note'))}")


def _measured(kind: str, name: str, root: str) -> list[dict[str, Any]]:
    code = "import sys; from bench.loading import main; main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, kind, name, root, str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ,
    )
    if done.returncode:
        note = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
        return [{"candidate": kind, "status": "failed", "note": note}]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return [
        {"candidate": candidate, "status": "ok"} | {k: float(f"{v:.4g}") for k, v in row.items()}
        for candidate, row in found.items()
    ]
