"""`moerge inspect`: routing heatmaps, entropy, and the distance from the best expert."""

from __future__ import annotations

import argparse
import json
from functools import cache, partial
from pathlib import Path

from ..evaluation.inspect_results import best_experts, read_results, record
from ..evaluation.runs import parse_runs, with_top_k
from ..files.atomic import check_can_write, write_atomically
from .options import (
    add_tasks_and_model,
    build_routers,
    check_writer,
    listed,
    load,
    read_tasks,
    similar_of_task,
)
from .prompt_options import prompt_of

COLUMNS = ("method", "task", "oracle", "entropy", "kl_oracle_routing", "weight_of_oracle", "score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_tasks_and_model(parser)
    parser.set_defaults(limit=32)
    add = parser.add_argument
    add("--methods", default="phatgoose", metavar="A,B,...", help="as in `moerge eval` (default: %(default)s)")
    add(
        "--oracle",
        nargs="+",
        default=[],
        metavar="TASK=EXPERT",
        help="best experts (default: the one of --results, or the one of the task's name)",
    )
    add("--results", type=Path, metavar="FILE", help="results.json of `moerge eval`: for the correlation with accuracy")
    add("--output", type=Path, metavar="DIR", default=Path("moerge-inspect"), help="where to (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    check_writer(args)
    check_can_write(args.output)
    tasks = read_tasks(args, metric="exact_match")
    methods = with_top_k(listed(args.methods), args.top_k)
    given = dict(_pair(text) for text in args.oracle)
    results = read_results(args.results) if args.results else []

    from rich.console import Console
    from rich.table import Table

    from .. import load_experts
    from ..evaluation.composition import report as composition
    from ..evaluation.evaluate import Settings
    from ..evaluation.heatmaps import draw
    from ..evaluation.inspect import correlations, inspect

    experts = load_experts(args.experts, base=args.model)
    runs, derived = parse_runs(methods, experts.names)
    if derived or not runs:
        raise ValueError(f"--methods takes methods that route, got {args.methods!r}")
    loaded = cache(partial(load, args))
    routers = build_routers(args, experts, [run.method for run in runs], loaded)
    model, tokenizer = loaded()
    form = prompt_of(args)
    settings = Settings(template=form.template, chat=form.chat, similar=similar_of_task(args, routers))
    best = {task: expert for task, expert in best_experts(results).items() if expert is None or expert in experts.names}
    found = inspect(
        model,
        tokenizer,
        experts,
        runs,
        tasks,
        settings,
        oracles=best | given,
        routers=routers,
        progress=not args.no_progress,
    )
    shares = {(row["method"], row["task"]): row["score"] for row in results}
    related = correlations(found, shares)
    rows = [record(i, shares.get((i.method, i.task))) for i in found]
    args.output.mkdir(parents=True, exist_ok=True)
    report = {"experts": list(experts.names), "rows": rows, "pearson_kl_score": related}
    path = args.output / "inspect.json"
    write_atomically(path, lambda file: file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
    made = args.output / "composition.md"
    write_atomically(made, lambda file: file.write_text(composition(found, tasks, experts), encoding="utf-8"))
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(_text(row[column]) for column in COLUMNS))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    for method, value in related.items():
        console.print(f"{method}: Pearson correlation of KL and score over tasks: {_text(value)}", highlight=False)
    console.print(
        "wrote " + ", ".join(map(str, [path, made, *draw(found, args.output)])), highlight=False, soft_wrap=True
    )
    return 0


def _text(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value


def _pair(text: str) -> tuple[str, str]:
    task, equals, expert = text.partition("=")
    if not (task and equals and expert):
        raise ValueError(f"--oracle takes TASK=EXPERT, got {text!r}")
    return task, expert
