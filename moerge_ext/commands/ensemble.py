"""`moerge ensemble`: PELMo's table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..ensemble.judge import JUDGES
from ..files.atomic import check_can_write, write_atomically
from .options import add_prompts_and_model, answering, build_ensemble, read_questions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_prompts_and_model(parser)
    add = parser.add_argument
    add("--router", required=True, type=Path, metavar="DIR", help="from `moerge train-router`")
    add("--single-label-router", type=Path, metavar="DIR", help="from `moerge train-router --single-label`")
    add("--top-k", type=int, nargs="+", metavar="K", help="experts mixed (default: 1 .. 4, or as many as there are)")
    add("--output", type=Path, metavar="DIR", default=Path("moerge-ensemble"), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The table, the plot, and the best ensemble against the best expert; returns the exit status."""
    check_can_write(args.output)
    rows = read_questions(args)

    from rich.console import Console

    from ..ensemble.measure import measure, plot_top_k
    from ..ensemble.router import PromptRouter
    from ..evaluation.metrics import paired_difference
    from ..evaluation.report import terminal, write

    router = PromptRouter.load(args.router, device=args.device)
    single = PromptRouter.load(args.single_label_router, device=args.device) if args.single_label_router else None
    ensemble = build_ensemble(args)
    top_ks = args.top_k or range(1, min(4, len(ensemble.names)) + 1)
    scores = measure(
        ensemble,
        [row["question"] for row in rows],
        [row["target"] for row in rows],
        JUDGES[args.judge],
        router=router,
        single_label=single,
        top_ks=list(top_ks),
        task=args.data.stem,
        **answering(args),
    )
    paths = write(scores, args.output)
    mixed = max((s for s in scores if s.method.startswith("top-")), key=lambda s: s.value)
    best = max((s for s in scores if s.method in ensemble.names), key=lambda s: s.value)
    mean, low, high = paired_difference(mixed.items, best.items)
    facts = {"ensemble": mixed.method, "expert": best.method, "n": mixed.n, "mean": mean, "low": low, "high": high}
    paths.append(args.output / "paired.json")
    write_atomically(paths[-1], lambda file: file.write_text(json.dumps(facts) + "\n", encoding="utf-8"))
    console = Console(width=None if Console().is_terminal else 160)
    try:
        paths.append(plot_top_k(scores, ensemble.names, args.output / "top_k.png"))
    except ImportError as error:
        console.print(f"no plot: {error}", highlight=False)
    console.print(terminal(scores))
    console.print(
        f"{mixed.method} - {best.method} (the best of each, chosen on these {mixed.n} questions): "
        f"{100 * mean:+.1f} points, paired 95 % interval {100 * low:+.1f} to {100 * high:+.1f}",
        highlight=False,
    )
    console.print("wrote " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)
    return 0
