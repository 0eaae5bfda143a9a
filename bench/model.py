"""The suites model and real: a Llama-shaped random model, plain, patched, and under PEFT's Arrow; and SmolLM2-135M with
eight experts beside PEFT with one of them.

Times: prefill of T tokens and one greedy token with a cache behind it, the models interleaved in one process over the
same base weights. Memory: one process per variant. Dispatch: what a patched layer costs beyond its arithmetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cells import DTYPES
from .model_build import SIZES, arrow_model, base_model, dispatch_layers, make_bank, one_adapter_model, patched_model
from .results import Recorder
from .timing import PLAIN, PLAIN_AGAIN, Candidate, Clock, Settings, interleave, relative_error, summarize

# relative error of the logits, Frobenius; layers amplify it, and routing near a tie may differ in bfloat16
TOLERANCE = {"float32": 1e-2}


@dataclass(frozen=True)
class Variants:
    """The same base weights under each method."""

    plain: nn.Module
    ours: nn.Module
    ours_arrow: nn.Module | None
    peft_arrow: nn.Module | None
    peft_one: nn.Module | None
    bank_bytes: int

    def named(self) -> list[tuple[str, nn.Module]]:
        found = [(PLAIN, self.plain), (PLAIN_AGAIN, self.plain), ("ours", self.ours)]
        found += [("ours_arrow", self.ours_arrow), ("peft_arrow", self.peft_arrow), ("peft_one", self.peft_one)]
        return [(label, model) for label, model in found if model is not None]


def build(name: str, dtype: torch.dtype, device: torch.device) -> Variants:
    """The variants of a size; they share the base weights and the bank (PEFT keeps its own layout of B)."""
    size, real = SIZES[name], name == "real"
    base = base_model(name, dtype, device)
    bank = make_bank(base, size, dtype, device)
    return Variants(
        plain=base,
        ours=patched_model(base, bank, "phatgoose", top_k=size.top_k),
        ours_arrow=None if real else patched_model(base, bank, "arrow_peft", top_k=size.top_k, seed=0),
        peft_arrow=None if real else arrow_model(base, bank, size),
        peft_one=one_adapter_model(base, bank, size) if real else None,
        bank_bytes=sum(m.lora_A.nbytes + m.lora_B.nbytes for m in bank.modules.values()),
    )


def check(variants: Variants, ids: torch.Tensor) -> str:
    """Ours against the same patch on the reference backend, for tokens [1,T]; what is wrong, or an empty string."""
    from moerge_ext import RoutedLinear

    got = variants.ours(input_ids=ids).logits
    layers = [m for m in variants.ours.modules() if isinstance(m, RoutedLinear)]
    before = [layer.backend for layer in layers]
    for layer in layers:
        layer.backend = "reference"
    want = variants.ours(input_ids=ids).logits
    for layer, backend in zip(layers, before, strict=True):
        layer.backend = backend
    limit = TOLERANCE.get(str(got.dtype).removeprefix("torch."), 0.1)
    error = relative_error(got, want, want)
    return "" if error <= limit else f"logits differ by {error:.3g} from the reference backend, allowed {limit:g}"


def prefill(model: nn.Module, ids: torch.Tensor) -> Callable[[int], Any]:
    """One forward over the prompt; only the last token's logits, as generation does."""
    return lambda _: model(input_ids=ids, use_cache=True, logits_to_keep=1)


def decode(model: nn.Module, ids: torch.Tensor) -> Callable[[int], Any]:
    """One token on top of the prompt's cache, which is cut back afterwards so that every call does the same work."""
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, -1:]

    def call(_: int) -> Any:
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return out

    return call


def time_size(name: str, dtype_name: str, clock: Clock, settings: Settings) -> list[dict[str, Any]]:
    """Rows of prefill and decode for every variant."""
    size, device = SIZES[name], clock.device
    variants = build(name, DTYPES[dtype_name], device)
    ids = torch.randint(3, size.vocabulary, (1, size.tokens), generator=torch.Generator().manual_seed(0)).to(device)
    wrong = check(variants, ids[:, :8])
    if wrong:
        return [{"candidate": "ours", "own": True, "status": "wrong", "note": wrong}]
    rows = []
    for phase, make in (("prefill", prefill), ("decode", decode)):
        found = [Candidate(label, make(model, ids), own=label == "ours") for label, model in variants.named()]
        for candidate in found:
            candidate.seconds = clock.batch(candidate.call, 0, 1, 1)
        times = interleave(found, clock, settings, 1)
        for candidate in found:
            stats = summarize(times[candidate.label], times[PLAIN])
            per_module = stats["branch"] / size.modules
            rows.append(
                {"candidate": candidate.label, "own": candidate.own, "status": "ok", "phase": phase}
                | stats
                | {"branch_per_module": float(f"{per_module:.4g}"), "bank_mib": round(variants.bank_bytes / 2**20, 1)}
            )
    return rows


def time_dispatch(clock: Clock, settings: Settings) -> list[dict[str, Any]]:
    """One token through a layer of D = O = 8: what remains is Python, dispatch and launches."""
    plain, ours = dispatch_layers(clock.device)
    x = torch.randn(1, 8, device=clock.device)
    found = [
        Candidate(PLAIN, lambda _: plain(x)),
        Candidate(PLAIN_AGAIN, lambda _: plain(x)),
        Candidate("ours", lambda _: ours(x), own=True),
    ]
    # microseconds of Python: longer samples, or a moment of the machine decides
    times = interleave(found, clock, replace(settings, min_sample=10 * settings.min_sample), 1)
    return [
        {"candidate": c.label, "own": c.own, "status": "ok", "phase": "dispatch"}
        | summarize(times[c.label], times[PLAIN])
        for c in found
    ]


def run(size_name: str, recorder: Recorder, device: torch.device, settings: Settings) -> list[str]:
    """Measures what is not recorded yet; returns the complaints about wrong results of our own."""
    size, clock, problems = SIZES[size_name], Clock(device), []
    settings = replace(settings, rounds=min(settings.rounds, 7), candidate_seconds=4.0, main_seconds=6.0)
    jobs: list[tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]] = []
    if size_name != "real":
        dispatch = {"mode": "dispatch", "D": 8, "O": 8, "E": 8, "K": 2, "R": 2}
        jobs.append((dispatch, lambda: time_dispatch(clock, settings)))
    for dtype in ("float32", "bfloat16"):
        facts = {"size": size_name, "dtype": dtype} | size.facts()
        jobs.append((facts | {"mode": "time"}, lambda d=dtype: time_size(size_name, d, clock, settings)))
        # four processes that each build the model: half a minute
        if size_name == "full" or (size_name != "real" and dtype == "float32"):
            jobs.append((facts | {"mode": "memory"}, lambda d=dtype: memory_rows(size_name, d, device)))
    for facts, work in jobs:
        cell = {"suite": "model"} | facts
        label = f"model {facts['mode']} {facts.get('size', '')} {facts.get('dtype', '')}".rstrip()
        if recorder.has(cell):
            print(f"{label}: recorded already")
            continue
        with torch.no_grad():
            rows = work()
        recorder.add(cell, rows)
        problems += [f"{label}: {r['note']}" for r in rows if r.get("own") and r["status"] == "wrong"]
        _report(label, rows)
    return problems


def memory_rows(size_name: str, dtype: str, device: torch.device) -> list[dict[str, Any]]:
    """Peak memory of each variant, one fresh process each."""
    rows = []
    # of the tiny size one shows that it works, and each takes seconds to load its libraries
    for variant in ("ours",) if size_name == "tiny" else (PLAIN, "ours", "peft_arrow"):
        code = "import sys; from bench.model_memory import main; main(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", code, size_name, dtype, device.type, variant, str(torch.get_num_threads())],
            capture_output=True,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            env=os.environ,
        )
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            rows.append({"candidate": variant, "status": "ok", "phase": "memory"} | json.loads(lines[-1]))
        else:
            note = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200]
            rows.append({"candidate": variant, "status": "failed", "phase": "memory", "note": note})
    return rows


def _report(label: str, rows: list[dict[str, Any]]) -> None:
    print(label)
    for row in rows:
        if row["status"] != "ok":
            print(f"    {row['candidate']:<14} {row['status'].upper()}: {row['note']}")
        elif row["phase"] == "memory":
            print(
                f"    {row['candidate']:<14} built {row['built_mib']:.0f} MiB, peak while running {row['peak_mib']:.0f}"
            )
        else:
            text = f"    {row['candidate']:<14} {row['phase']:<8} {row['us'] / 1e3:9.3f} ms  ratio {row['ratio']:.3f}"
            print(f"{text} [{row['ratio_p10']:.3f}, {row['ratio_p90']:.3f}]")
    sys.stdout.flush()
