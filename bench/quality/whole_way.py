"""A real run of docs/whole_way.sh, kept as bench/results/whole_way.json, and the figures of docs/whole_way.md from it.

python bench/quality/whole_way.py --tasks DIR --steps 40 --gate-steps 20 --rows 25 NAME NAME NAME
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # as a script only its own folder is on the path

from bench.machine import cpu_model  # noqa: E402
from moerge_ext.models import smollm2  # noqa: E402

RESULT = "whole_way.json"
MADE = ("oracle_dataset", "best_individual")  # of other rows' answers, so without a cost
SCORED = ("score", "low", "high", "n", "tokens_per_second")


def walk(model: Path, tasks: Path, output: Path, names: Sequence[str], settings: dict[str, str]) -> tuple[str, float]:
    """(what the script printed, seconds) of a whole run. subprocess.CalledProcessError where a step fails."""
    start = time.perf_counter()
    done = subprocess.run(
        ["bash", str(ROOT / "docs" / "whole_way.sh"), str(model), str(tasks), str(output), *names],
        env=os.environ | {"MOERGE": f"{sys.executable} -m moerge_ext", "MPLBACKEND": "agg"} | settings,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout, time.perf_counter() - start


def packed(output: Path, names: Sequence[str]) -> dict[str, Any]:
    """What the run left behind: the scores of every row of the table, an answer with its experts' shares."""
    scores = json.loads((output / "eval" / "results.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, dict]] = {}
    for score in scores:
        rows.setdefault(score["method"], {})[score["task"]] = {key: score[key] for key in SCORED}
    (answer,) = map(json.loads, (output / "answers.jsonl").read_text(encoding="utf-8").splitlines())
    sizes = {
        name: sum(file.stat().st_size for file in (output / "experts" / name).glob("*.safetensors")) for name in names
    }
    return {"scores": rows, "answer": answer, "bytes": sizes}


def page(_rows: Sequence[Any], folder: Path) -> str:
    """The part of docs/whole_way.md that is of the run."""
    file = folder / RESULT
    if not file.exists():
        return "not measured yet"
    found = json.loads(file.read_text(encoding="utf-8"))
    names, settings = list(found["bytes"]), found["settings"]
    lines = [f"| % right | {' | '.join(names)} | tokens/s |", "| --- |" + " ---: |" * (len(names) + 1)]
    for method, of_tasks in found["scores"].items():
        cells = [f"{s['score']:.0%} ({s['low']:.0%} to {s['high']:.0%})" for s in map(of_tasks.get, names)]
        speeds = [of_tasks[name]["tokens_per_second"] for name in names]
        lines.append(f"| {method} | {' | '.join(cells)} | {'' if method in MADE else f'{min(speeds):,.0f}'} |")
    answer, experts = found["answer"], found["answer"]["experts"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in experts.items())
    items = next(iter(found["scores"]["base"].values()))["n"]
    size, minutes = min(found["bytes"].values()) / 2**20, found["seconds"] / 60
    facts = (
        f"{found['model']}, {len(names)} experts of {settings['STEPS']} steps, gates of {settings['GATE_STEPS']}, in "
        f"batches of {settings['BATCH']} rows ({size:.0f} MiB each); {items} test rows of every task, with 95 % "
        f"intervals. {minutes:.0f} minutes in all, threads: {found['threads']}, {found['cpu']}; tokens/s are the "
        "slowest task's, prompts and answers together."
    )
    asked = ("", "One row of the first task, asked with PHATGOOSE choosing:", "")
    said = (f"    prompt   {answer['prompt']!r}", f"    answer   {answer['text']!r}", f"    experts  {shares}")
    return "\n".join([facts, "", *lines, *asked, *said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="tasks; each becomes an expert")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of task folders")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2 (default: the one that its package makes, once)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--gate-steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / RESULT)
    args = parser.parse_args()
    import torch

    settings = {"STEPS": args.steps, "GATE_STEPS": args.gate_steps, "BATCH": args.batch, "ROWS": args.rows}
    settings = {key: str(value) for key, value in settings.items()}
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or smollm2.base()
        said, seconds = walk(model, args.tasks, Path(temporary) / "out", args.names, settings)
        print(said)
        facts = {"model": f"SmolLM2-135M-Instruct ({smollm2.PACKAGE})", "settings": settings, "cpu": cpu_model()}
        facts |= {"threads": torch.get_num_threads(), "seconds": round(seconds)}
        facts |= packed(Path(temporary) / "out", args.names)
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
