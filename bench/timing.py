"""Interleaved timing: A B C A B C ..., in one process, so that a slow moment of the machine hits every candidate."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLAIN, PLAIN_AGAIN = "plain", "plain_again"
SLOW = 0.3  # seconds; such a call is not run twice only to learn how long it takes


@dataclass(frozen=True)
class Settings:
    """How long and how carefully to measure. All times in seconds."""

    rounds: int = 11
    min_rounds: int = 3
    min_sample: float = 0.003  # calls are batched until a sample takes at least this
    candidate_seconds: float = 0.6  # a slow candidate takes part in fewer rounds
    main_seconds: float = 2.0  # the same for plain and ours
    call_seconds: float = 4.0  # a candidate whose single call takes longer is not timed
    cell_seconds: float = 60.0  # no further round is started after this
    memory_gib: float = 6.0  # a candidate or cell that needs more is not run
    cold: bool = True  # rotate over copies of the weights that exceed the last-level cache together
    max_copies: int = 64
    graphs: bool = False  # on CUDA: time the replay of captured graphs instead of eager calls
    triton_peers: Path | None = None  # folder that the Triton kernels of serving engines are imported from

    def identity(self) -> list[Any]:
        """What must agree for an earlier result to stand for a new one."""
        more = [name for name in ("graphs", "triton_peers") if getattr(self, name)]
        return [self.rounds, self.min_sample, self.candidate_seconds, self.main_seconds, self.cold, *more]


class Clock:
    """Times a batch of calls on one device: wall time on the CPU, events around the queue on CUDA.

    With `graphs`, a batch on CUDA is one replay of a graph of that many calls, captured when it is first asked for.
    """

    def __init__(self, device: torch.device, graphs: bool = False):
        self.device = device
        self.graphs = graphs and device.type == "cuda"
        self._captured: dict[
            tuple, Any
        ] = {}  # (call, first, calls) -> (graph, the call: its identity must not be reused)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batch(self, call: Callable[[int], Any], first: int, calls: int, copies: int) -> float:
        """Seconds per call over `calls` calls, on the copies first, first + 1, ... in turn."""
        if self.device.type == "cuda":
            return self._cuda_batch(call, first, calls, copies)
        begin = time.perf_counter()
        for i in range(first, first + calls):
            call(i % copies)
        return (time.perf_counter() - begin) / calls

    def _cuda_batch(self, call: Callable[[int], Any], first: int, calls: int, copies: int) -> float:
        graph = self.capture(call, first % copies, calls, copies) if self.graphs else None
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        if graph is not None:
            graph.replay()
        else:
            for i in range(first, first + calls):
                call(i % copies)
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3 / calls

    def capture(self, call: Callable[[int], Any], first: int, calls: int, copies: int) -> torch.cuda.CUDAGraph:
        """The graph of `calls` calls. RuntimeError where the call cannot be captured."""
        key = (id(call), first, calls)
        if key not in self._captured:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                call(first)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for i in range(first, first + calls):
                    call(i % copies)
            graph.replay()
            self._captured[key] = (graph, call)
        return self._captured[key][0]

    def forget(self) -> None:
        """Frees the graphs: they hold memory, and the weights of one cell."""
        self._captured.clear()


@dataclass
class Candidate:
    """One way to do the work. `call(i)` runs it on copy i of the weights and returns y [T,O]."""

    label: str
    call: Callable[[int], Any]
    truth: str = "phatgoose"  # which reference result it must match
    own: bool = False  # a wrong result of ours fails the run
    tolerance: float | None = None  # relative error of the branch; None: the suite's, by dtype
    transient: float = 0.0  # bytes it allocates beyond its inputs and output
    traffic: float = 0.0  # bytes it moves at least; predicts a call that is too slow to try
    note: str = ""
    skip: str = ""  # why it is not run here
    seconds: float = 0.0  # of the checked call


def interleave(
    candidates: Sequence[Candidate], clock: Clock, settings: Settings, copies: int
) -> dict[str, list[float | None]]:
    """Seconds per call for each candidate and round; None where a slow candidate sat out.

    Plain takes part in every round, so every sample has a plain sample taken moments before it.
    """
    plans = {}
    position = 0
    for candidate in candidates:
        once = candidate.seconds
        if once < SLOW:  # the first call may have paid for one-time work
            once = max(clock.batch(candidate.call, 0 if clock.graphs else position + i, 1, copies) for i in range(2))
            position += 2
        calls = max(1, min(10000, math.ceil(settings.min_sample / max(once, 1e-7))))
        main = candidate.own or candidate.label in (PLAIN, PLAIN_AGAIN)
        budget = settings.main_seconds if main else settings.candidate_seconds
        rounds = max(settings.min_rounds, min(settings.rounds, int(budget / (once * calls))))
        plans[candidate.label] = (calls, rounds)
    total = max(rounds for _, rounds in plans.values())
    plans[PLAIN] = (plans[PLAIN][0], total)
    times: dict[str, list[float | None]] = {c.label: [] for c in candidates}
    begin = time.perf_counter()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(total):
            if number >= settings.min_rounds and time.perf_counter() - begin > settings.cell_seconds:
                break
            for candidate in candidates:
                calls, rounds = plans[candidate.label]
                if number < rounds:
                    if calls > 1 and clock.device.type == "cpu":
                        # untimed: its code is no longer in the caches, as it is from layer to layer of one model
                        clock.batch(candidate.call, position, 1, copies)
                        position += 1
                    start = 0 if clock.graphs else position  # one graph serves every round
                    times[candidate.label].append(clock.batch(candidate.call, start, calls, copies))
                    position += calls
                else:
                    times[candidate.label].append(None)
    finally:
        if was_enabled:
            gc.enable()
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(p10, median, p90), linearly interpolated."""
    q = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    return tuple(q.tolist())


def summarize(own: Sequence[float | None], plain: Sequence[float]) -> dict[str, float]:
    """Times of one candidate in microseconds; ratio and branch are paired with plain's sample of the same round."""
    pairs = [(t, p) for t, p in zip(own, plain, strict=True) if t is not None]
    out: dict[str, float] = {"rounds": len(pairs)}
    for name, values, scale in (
        ("us", [t for t, _ in pairs], 1e6),
        ("ratio", [t / p for t, p in pairs], 1.0),
        ("branch", [t - p for t, p in pairs], 1e6),
    ):
        low, median, high = quantiles(values)
        out |= {f"{name}": _short(median * scale), f"{name}_p10": _short(low * scale)}
        out[f"{name}_p90"] = _short(high * scale)
    return out


def _short(value: float) -> float:
    """Five significant digits: more is noise."""
    return float(f"{value:.5g}")


def relative_error(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """|got - want| / |scale| in the Frobenius norm; nan counts as infinite."""
    error = ((got.double() - want.double()).norm() / scale.double().norm()).item()
    return math.inf if math.isnan(error) else error
