"""The suites linear, route and lora: one layer, all candidates, checked against the reference and then timed."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cells import Cell
from .data import Tokens, Weights, copies_needed, weights_bytes
from .floor import floor
from .peers import candidates as peers_of
from .results import Recorder
from .timing import PLAIN, PLAIN_AGAIN, Candidate, Clock, Settings, interleave, relative_error, summarize

# a cell in which plain and plain_again differ by more is measured again, so often
NOISY, RETRIES = 0.2, 2
# relative error of the branch, Frobenius; the tests of the ops are far stricter, this catches a wrong answer
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.04, "float16": 0.01}


def check(candidate: Candidate, result: Any, cell: Cell, tokens: Tokens) -> str:
    """What is wrong with a result, or an empty string."""
    limit = candidate.tolerance or TOLERANCE[cell.dtype]
    if candidate.truth == "routing":
        got, experts = result
        dense = torch.zeros_like(got.float(), dtype=torch.float32).new_zeros(cell.T, cell.E)
        want = dense.clone().scatter_(1, tokens.experts64, tokens.weights)
        error = relative_error(dense.scatter_(1, experts.long(), got.float()), want, want)
    else:
        y: Tensor = result
        if tuple(y.shape) != (cell.T, cell.O) or y.dtype != cell.torch_dtype:
            return f"expected [{cell.T}, {cell.O}] {cell.dtype}, got {list(y.shape)} {y.dtype}"
        if not y.isfinite().all():
            return "result has values that are not finite"
        error = relative_error(y[tokens.checked], tokens.truth(candidate.truth), tokens.branch)
    return "" if error <= limit else f"relative error {error:.3g} against the reference, allowed {limit:g}"


def admit(
    found: Iterable[Candidate],
    cell: Cell,
    tokens: Tokens,
    ability: dict[str, float],
    settings: Settings,
    clock: Clock | None = None,
    copies: int = 1,
) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Runs every candidate once: (those to time, rows of those that are wrong or not run).

    With a clock that replays graphs, a candidate that cannot be captured is among the latter.
    """
    good, rows = [], []
    for candidate in found:
        gib = candidate.transient / 2**30
        predicted = candidate.traffic / (ability["bandwidth"] * 1e9)
        status, why = "skipped", ""
        if candidate.skip:
            why = candidate.skip
        elif gib > settings.memory_gib:
            why = f"needs {gib:.1f} GiB, cap {settings.memory_gib:g}"
        elif predicted > settings.call_seconds:
            why = f"one call takes at least {predicted:.1f} s, cap {settings.call_seconds:g}"
        else:
            try:
                begin = time.perf_counter()
                result = candidate.call(0)
                took = time.perf_counter() - begin
                wrong = check(candidate, result, cell, tokens)
                del result
                if clock and clock.graphs and not wrong:
                    clock.capture(candidate.call, 0, 1, copies)
            except Exception as error:  # a peer may fail in any way
                status, why = "failed", f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            else:
                if wrong:
                    status, why = "wrong", wrong
                elif took > settings.call_seconds and candidate.label not in (PLAIN, PLAIN_AGAIN):
                    why = f"one call takes {took:.1f} s, cap {settings.call_seconds:g}"
                candidate.seconds = took
        if why:
            rows.append({"candidate": candidate.label, "own": candidate.own, "status": status, "note": why})
        else:
            good.append(candidate)
    return good, rows


def measure_cell(
    suite: str, cell: Cell, weights: Weights, ability: dict[str, float], clock: Clock, settings: Settings
) -> list[dict[str, Any]]:
    """The rows of one cell. RuntimeError when even the plain layer cannot be timed."""
    tokens = Tokens(cell, weights)
    found = peers_of(cell, weights, tokens, settings.triton_peers)
    good, rows = admit(found, cell, tokens, ability, settings, clock, weights.copies)
    if [c.label for c in good[:2]] != [PLAIN, PLAIN_AGAIN]:
        raise RuntimeError(f"{cell}: the plain layer disagrees with the reference: {rows}")
    times = interleave(good, clock, settings, weights.copies)
    clock.forget()
    # plain's time is part of a candidate's in the suite linear only; elsewhere the branch is all there is
    whole = cell.mode in ("apply", "routed")
    noise = summarize(times[PLAIN_AGAIN], times[PLAIN])
    common = floor(cell, tokens.experts_used, ability) | {
        "experts_used": tokens.experts_used,
        "copies": weights.copies,
        "noise": round(max(abs(noise["ratio_p10"] - 1), abs(noise["ratio_p90"] - 1)), 4),
        "bandwidth": ability["bandwidth"],
        "rate": max(ability["float32"], ability.get(cell.dtype, 0.0)),
    }
    for candidate in good:
        stats = summarize(times[candidate.label], times[PLAIN])
        if not whole and candidate.label not in (PLAIN, PLAIN_AGAIN):
            stats |= {key.replace("us", "branch"): stats[key] for key in ("us", "us_p10", "us_p90")}
        row = {"candidate": candidate.label, "own": candidate.own, "status": "ok", "note": candidate.note}
        if candidate.label not in (PLAIN, PLAIN_AGAIN):
            stats["over_floor"] = float(f"{stats['branch'] / common['floor_us']:.4g}")
        rows.append(row | stats | common)
    for row in rows:
        row["suite"] = suite
    return rows


def noise(rows: list[dict[str, Any]]) -> float:
    """The A/A noise of a cell's rows; those of candidates that were not timed have none."""
    return max((row["noise"] for row in rows if "noise" in row), default=0.0)


def undisturbed(measure: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of measure(); of more than one run where plain and plain_again differ by over NOISY: the best."""
    best = measure()
    for _ in range(RETRIES):
        if noise(best) <= NOISY:
            break
        best = min(best, measure(), key=noise)
    return best


def measure_undisturbed(suite: str, *of_cell: Any) -> list[dict[str, Any]]:
    """The rows of measure_cell, of the least disturbed of a few runs."""
    return undisturbed(partial(measure_cell, suite, *of_cell))


def run(
    suite: str,
    cells: list[Cell],
    recorder: Recorder,
    ability: dict[str, float],
    device: torch.device,
    settings: Settings,
    measure: Callable[..., list[dict[str, Any]]] = measure_undisturbed,
) -> list[str]:
    """Measures what is not recorded yet; returns the complaints about wrong results of our own.

    `measure` takes the arguments of measure_cell and returns rows.
    """
    clock = Clock(device, settings.graphs)
    weights: Weights | None = None
    problems = []
    for number, cell in enumerate(cells, 1):
        identity = {"suite": suite} | cell.describe()
        label = f"[{number}/{len(cells)}] {suite} {cell}"
        if recorder.has(identity):
            print(f"{label}: recorded already")
            continue
        needs = weights_bytes(cell, copies_needed(cell, device, settings)) / 2**30
        if needs > settings.memory_gib:
            print(f"{label}: SKIPPED, weights need {needs:.1f} GiB, cap {settings.memory_gib:g}")
            note = f"weights need {needs:.1f} GiB, cap {settings.memory_gib:g}"
            recorder.add(identity, [{"candidate": "all", "status": "skipped", "note": note}])
            continue
        begin = time.perf_counter()
        if weights is None or weights.cell.weights_key != cell.weights_key:
            weights = None
            _free()
            weights = Weights(replace(cell, only=None, also=()), device, settings)
        with torch.no_grad():
            rows = measure(suite, cell, weights, ability, clock, settings)
        recorder.add(identity, rows)
        problems += [f"{cell}: {r['candidate']}: {r['note']}" for r in rows if r.get("own") and r["status"] != "ok"]
        _report(label, rows, time.perf_counter() - begin)
    return problems


def _free() -> None:
    from . import peft_peers, triton_peers

    peft_peers.forget()
    triton_peers.forget()
    gc.collect()


def _report(label: str, rows: list[dict[str, Any]], seconds: float) -> None:
    print(f"{label}  ({seconds:.1f} s)")
    for row in rows:
        if row["status"] != "ok":
            print(f"    {row['candidate']:<19} {row['status'].upper()}: {row['note']}")
            continue
        if "kernel_us" in row:
            print(f"    {row['candidate']:<19} {row['kernel_us']:>11.1f} us in {row['launches']:g} kernels")
            continue
        text = f"    {row['candidate']:<19} {row['us']:>11.1f} us  ratio {row['ratio']:6.3f}"
        text += f" [{row['ratio_p10']:.3f}, {row['ratio_p90']:.3f}]"
        if "over_floor" in row:
            text += f"  branch {row['branch']:>10.1f} us = {row['over_floor']:.2f} x floor"
        print(text)
    sys.stdout.flush()
