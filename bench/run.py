"""Runs the benchmarks: `python bench/run.py SUITE`, of SUITES or `all`. See bench/README.md."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

import torch

from bench import cells, kernel_time, linear, loading, machine, model, serve
from bench.results import FOLDER, Recorder
from bench.timing import Settings

SUITES = ("linear", "route", "lora", "kernels", "model", "real", "loading", "serve")
TINY = Settings(
    rounds=3, min_rounds=2, min_sample=1e-4, candidate_seconds=0.05, main_seconds=0.05, cell_seconds=5.0, max_copies=2
)
FULL = Settings(call_seconds=20.0, cell_seconds=120.0)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    parser.add_argument("suite", choices=(*SUITES, "all"), help="all: linear and model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the whole grid (days), or the larger model; resumable")
    size.add_argument("--gpu", action="store_true", help="the few cells that a GPU is judged by")
    size.add_argument("--gpu-wide", action="store_true", help="the rest: float16, 512 experts, up to 16384 tokens")
    size.add_argument("--tiny", action="store_true", help="seconds; to see that it works")
    parser.add_argument("--warm", action="store_true", help="one copy of the weights, so that they stay in the cache")
    parser.add_argument("--graphs", action="store_true", help="on CUDA: time the replay of captured graphs")
    parser.add_argument("--triton-peers", type=Path, metavar="DIR", help="on CUDA: import vLLM's and SGLang's kernels")
    parser.add_argument("--filter", action="append", default=[], metavar="NAME=VALUE", help="e.g. T=16, dtype=float32")
    parser.add_argument("--seconds", type=float, help="start no further round of a cell after this")
    parser.add_argument("--call-seconds", type=float, help="do not time a candidate whose call takes longer")
    parser.add_argument("--memory", type=float, metavar="GIB", help="cap per candidate and for a cell's weights")
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--serve-folder",
        type=Path,
        default=Path(".serve"),
        metavar="DIR",
        help="where `serve` keeps its model and experts",
    )
    parser.add_argument("--serve-eager", action="store_true", help="`serve` without torch.compile")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the results files")
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    settings = TINY if args.tiny else FULL if args.full else Settings()
    given = {
        "cell_seconds": args.seconds,
        "call_seconds": args.call_seconds,
        "memory_gib": args.memory,
        "rounds": args.rounds,
        "triton_peers": args.triton_peers,
    }
    graphs = args.graphs and args.device == "cuda"
    return replace(
        settings, cold=not args.warm, graphs=graphs, **{key: value for key, value in given.items() if value is not None}
    )


def cells_of(suite: str, args: argparse.Namespace) -> list[cells.Cell]:
    """The suite's cells after --filter. ValueError for a filter that names no field."""
    sizes = {"tiny": cells.tiny_cells, "gpu": cells.gpu_cells, "gpu_wide": cells.gpu_wide_cells}
    sizes["full"] = cells.full_cells
    chosen = next((make for name, make in sizes.items() if getattr(args, name)), cells.default_cells)()
    if suite in cells.OPS:
        chosen = cells.op_cells(chosen, suite)
    for text in args.filter:
        name, _, value = text.partition("=")
        if name not in cells.Cell.__dataclass_fields__:
            raise ValueError(f"--filter {text}: expected one of D, O, E, K, R, T, dtype, popularity, mode")
        chosen = [cell for cell in chosen if str(getattr(cell, name)) in value.split(",")]
    return chosen


def main(argv: list[str] | None = None) -> int:
    """0, or 1 when a result of ours was wrong."""
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench: no CUDA device is visible", file=sys.stderr)
        return 2
    if args.suite == "serve" and importlib.util.find_spec("vllm") is None:
        print(
            "bench: serve needs vllm, which this Python has not: make .venv-serve/.built; "
            ".venv-serve/bin/python bench/run.py serve",
            file=sys.stderr,
        )
        return 2
    if args.suite in ("model", "real"):
        machine.keep_memory()
    settings = settings_of(args)
    begin = time.perf_counter()
    environment = machine.environment(device)
    ability = machine.measure(device, small=args.tiny)
    recorder = Recorder(args.results, environment, settings)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    rates = ", ".join(f"{ability[name]} ({name})" for name in cells.DTYPES if name in ability)
    print(f"bandwidth {ability['bandwidth']} GB/s; GEMM in GFLOP/s: {rates}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        print(f"NOTE: the load of this machine is {os.getloadavg()[0]:.1f}; quiet it for numbers worth keeping")
    problems = []
    for suite in ("linear", "model") if args.suite == "all" else (args.suite,):
        if suite == "model":
            size = "tiny" if args.tiny else "full" if args.full else "quick"
            problems += model.run(size, recorder, device, settings)
        elif suite == "serve":
            concurrent = serve.CONCURRENT[:1] if args.tiny else serve.CONCURRENT
            problems += serve.run(recorder, args.serve_folder, settings.rounds, concurrent, args.serve_eager)
        elif suite == "real":
            problems += model.run("real", recorder, device, settings)
        elif suite == "loading":
            loading.run("tiny" if args.tiny else "quick", recorder)
        else:
            measure = kernel_time.measure_cell if suite == "kernels" else linear.measure_undisturbed
            problems += linear.run(suite, cells_of(suite, args), recorder, ability, device, settings, measure)
    print(f"{time.perf_counter() - begin:.0f} s in total; rows in {recorder.path.name}")
    for problem in problems:
        print(f"WRONG: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
