"""The suite `kernels`: how long each candidate's kernels take on the GPU by themselves, and how many there are.

Beside the wall time of the suite linear this says whether a cell waits for the host. It runs in a process of its own:
a profiler that has been used once slows down the launches of what is timed after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .cells import Cell
from .data import Tokens, Weights
from .linear import admit
from .peers import candidates
from .timing import Candidate, Clock, Settings

CALLS, SECONDS = 20, 0.2  # profiled calls, fewer of a slow candidate
LONGEST = 8  # kernels of a candidate that its row names, the longest first
NONE_SEEN = "torch's profiler saw no kernels: there are none on a CPU, and on a GPU it needs CUPTI"


def profiled(call: Callable[[int], Any], calls: int, copies: int, clock: Clock) -> Iterable[Any]:
    """What torch's profiler has to say of `calls` calls, by name."""
    cuda = clock.device.type == "cuda"
    clock.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for i in range(calls):
            call(i % copies)
        clock.synchronize()
    return profiler.key_averages()


def summarize(events: Iterable[Any], calls: int) -> dict[str, Any]:
    """kernel_us and launches per call, copies and fills included, and the longest by name; empty without kernels."""
    seen = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    if not seen:
        return {}
    seen.sort(key=lambda e: -e.self_device_time_total)
    return {
        "kernel_us": round(sum(e.self_device_time_total for e in seen) / calls, 2),
        "launches": round(sum(e.count for e in seen) / calls, 2),
        "kernels": {e.key[:100]: round(e.self_device_time_total / calls, 2) for e in seen[:LONGEST]},
    }


def row_of(candidate: Candidate, clock: Clock, copies: int) -> dict[str, Any]:
    calls = max(1, min(CALLS, int(SECONDS / max(candidate.seconds, 1e-6))))
    found = summarize(profiled(candidate.call, calls, copies, clock), calls)
    if not found:
        return {"candidate": candidate.label, "status": "skipped", "note": NONE_SEEN}
    return {"candidate": candidate.label, "own": candidate.own, "status": "ok", "note": candidate.note} | found


def measure_cell(
    suite: str, cell: Cell, weights: Weights, ability: dict[str, float], clock: Clock, settings: Settings
) -> list[dict[str, Any]]:
    """The rows of one cell: each candidate is checked as in the suite linear and then profiled."""
    tokens = Tokens(cell, weights)
    good, rows = admit(candidates(cell, weights, tokens, settings.triton_peers), cell, tokens, ability, settings)
    return [row | {"suite": suite} for row in [*rows, *(row_of(c, clock, weights.copies) for c in good)]]
