"""`moerge inspect`: routing heatmaps, entropy, and the distance from the best expert."""

from __future__ import annotations

import argparse
import json
import warnings
from functools import cache, partial
from pathlib import Path

from ..evaluation.canvas import check_matplotlib
from ..evaluation.heatmaps import VIEWS, draw
from ..evaluation.inspect import Inspection, check_oracles, check_routed, correlations, inspect
from ..evaluation.inspect_page import check_plotly, write_page
from ..evaluation.inspect_results import best_experts, check_same_oracles, read_results, record
from ..evaluation.runs import DERIVED, check_named, parse_run, parse_runs, split_methods, with_top_k
from ..files.atomic import check_can_write, write_atomically
from ..files.listing import listed
from ..methods import get_method
from .expert_options import gates_of, load_bank, placed, routers_of, with_routers
from .fits import check_runs_fit
from .needs import check_needs
from .options import (
    add_tasks_and_model,
    build_routers,
    check_asked,
    check_file,
    check_writer,
    load,
    read_tasks,
    similar_of_task,
)
from .prompt_options import prompt_of
from .results import check_results, keep_arguments
from .terminal import console
from .training_options import add_overwrite

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
    add(
        "--view",
        choices=VIEWS,
        default="layers",
        help="pictures: layers by kinds of linear layers, modules by experts as in PHATGOOSE's figure 3, or both "
        "(default: %(default)s)",
    )
    add("--html", type=Path, metavar="FILE", help="both views as one page with zoom that opens offline (needs plotly)")
    add("--output", type=Path, metavar="DIR", default=Path("moerge-inspect"), help="where to (default: %(default)s)")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    check_writer(args)
    gates_of(args)
    check_can_write(args.output)
    check_named(split_methods(args.methods))
    check_routed([parse_run(text) for text in split_methods(args.methods) if text not in DERIVED])
    check_results(args, "inspect.json", grows=("methods", "tasks", "oracle", "results"))
    check_matplotlib()
    if args.html is not None:
        check_plotly()
        check_file(args.html)
    tasks = read_tasks(args, metric="exact_match")
    methods = with_top_k(split_methods(args.methods), args.top_k)
    given = dict(_pair(text) for text in args.oracle)
    if unasked := sorted(set(given) - {task.name for task in tasks}):
        warnings.warn(f"--oracle: no task is called {listed(unasked)}; nothing is measured there", stacklevel=2)
    results = read_results(args.results) if args.results else []

    from ..evaluation.composition import report as composition
    from ..evaluation.evaluate import Settings

    experts = load_bank(args)
    runs, derived = parse_runs(methods, experts.names, args.top_k)
    runs = placed(with_routers(runs, routers_of(args)), args)
    if derived or not runs:
        raise ValueError(f"--methods takes methods that route, got {args.methods!r}")
    check_needs(args, experts, [get_method(run.method) for run in runs if run.method is not None])
    check_runs_fit(args, experts, runs)
    best = {task: expert for task, expert in best_experts(results).items() if expert in experts.names}
    named = {task.name: task.name for task in tasks if task.name in experts.names}
    check_oracles(given, experts.names)
    check_same_oracles(args.output / "inspect.json", named | best | given, overwrite=args.overwrite)
    check_asked(args, tasks, given=True)
    loaded = cache(partial(load, args))
    routers = build_routers(args, experts, [run.method for run in runs], loaded)
    model, tokenizer = loaded()
    form = prompt_of(args)
    settings = Settings(template=form.template, chat=form.chat, similar=similar_of_task(args, routers))
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
    _write(args, found, rows, related, composition(found, tasks, experts))
    return 0


def _write(args: argparse.Namespace, found: list[Inspection], rows: list[dict], related: dict, made_of: str) -> None:
    """inspect.json, what tasks are made of, and the pictures; the table is printed."""
    from rich.table import Table
    from rich.text import Text

    args.output.mkdir(parents=True, exist_ok=True)
    report = {"experts": list(found[0].experts), "rows": rows, "pearson_kl_score": related}
    path = args.output / "inspect.json"
    write_atomically(path, lambda file: file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
    made = args.output / "composition.md"
    write_atomically(made, lambda file: file.write_text(made_of, encoding="utf-8"))
    keep_arguments(args)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*(Text(_text(row[column])) for column in COLUMNS))
    screen = console()
    screen.print(table)
    for method, value in related.items() if args.results else ():
        screen.print(Text(f"{method}: Pearson correlation of KL and score over tasks: {_text(value)}"))
    pictures, notes = draw(found, args.output, args.view)
    written = list(map(str, [path, made, *pictures]))
    if args.html is not None:
        written.append(f"{args.html} ({write_page(found, args.html) / 1e6:.1f} MB)")
    for line in (*notes, *dashes(args, rows, related), "wrote " + ", ".join(written)):
        screen.print(Text(line), soft_wrap=True)


def dashes(args: argparse.Namespace, rows: list[dict], related: dict[str, float | None]) -> list[str]:
    """What a "-" in the table, or of a correlation, stands for; one line for each kind that there is."""
    notes = []
    blind = sorted({row["task"] for row in rows if not row["oracle"]})
    if len(blind) == len({row["task"] for row in rows}):
        notes.append("no oracle, nor what is measured against it: --oracle TASK=EXPERT names one, or --results the "
                     "results.json of `moerge eval --methods oracle_dataset`, where one expert is best")  # fmt: skip
    elif blind:
        notes.append(f"no oracle of {', '.join(blind)}: --oracle {blind[0]}=EXPERT names one")
    without = [f"{row['method']} on {row['task']}" for row in rows if row["score"] is None]
    if without and args.results:
        notes.append(f"no score of {listed(without)}: {args.results} has no such rows")
    elif without:
        notes.append("no scores: --results FILE, the results.json of `moerge eval` on these tasks, brings them")
    if args.results and None in related.values():
        notes.append("no correlation: it takes at least three tasks with an oracle and a score, and not all alike")
    return notes


def _text(value: str | float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else value


def _pair(text: str) -> tuple[str, str]:
    task, equals, expert = text.partition("=")
    if not (task and equals and expert):
        raise ValueError(f"--oracle takes TASK=EXPERT, got {text!r}")
    return task, expert
