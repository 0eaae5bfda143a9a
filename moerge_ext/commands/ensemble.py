"""`moerge ensemble`: PELMo's tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.atomic import check_can_write, write_atomically
from ..files.counting import counted
from .ensemble_options import (
    add_prompts_and_model,
    answering,
    build_ensemble,
    build_judges,
    read_config,
    read_questions,
)
from .results import check_results, keep_arguments
from .terminal import console
from .training_options import add_overwrite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_prompts_and_model(parser)
    add = parser.add_argument
    add("--router", type=Path, metavar="DIR", help="from `moerge train-router` (default: the one that --prompts names)")
    add("--single-label-router", type=Path, metavar="DIR", help="from `moerge train-router --single-label`")
    add("--top-k", type=int, nargs="+", metavar="K", help="experts mixed (default: 1 .. 4, or as many as there are)")
    add("--output", type=Path, metavar="DIR", default=Path("moerge-ensemble"), help="(default: %(default)s)")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """The table, the plot, and the best ensemble against the best expert; returns the exit status."""
    check_can_write(args.output)
    check_results(args, "results.json")
    questions = read_questions(args)

    from ..ensemble.figure import plot_top_k
    from ..ensemble.measure import ITEMS, MIXED, macro, macro_difference, measure
    from ..ensemble.questions import warn_of_shown
    from ..ensemble.router import PromptRouter
    from ..evaluation.report import terminal, write
    from ..evaluation.store import alone_in

    config = read_config(args)
    folder = args.router or config.router
    if folder is None:
        raise ValueError('a router is needed: --router DIR, or "router" in the file of --prompts')
    router = PromptRouter.load(folder, device=args.device)
    single = PromptRouter.load(args.single_label_router, device=args.device) if args.single_label_router else None
    judges = build_judges(args, questions)
    warn_of_shown(questions, [*config.experts, *config.few_shot.values()])
    ensemble = build_ensemble(args, config)
    top_ks = args.top_k or range(1, min(4, len(ensemble.names)) + 1)
    with alone_in(args.output):
        scores = measure(
            ensemble,
            questions,
            judges,
            router=router,
            single_label=single,
            few_shot=config.few_shot,
            top_ks=list(top_ks),
            answer_after=config.answer_after,
            **answering(args, config),
        )
    paths = [args.output / ITEMS, *write(scores, args.output), keep_arguments(args)]
    mixed = max((f"{MIXED}{k}" for k in top_ks), key=lambda name: macro(scores, name))
    best = max(ensemble.names, key=lambda name: macro(scores, name))
    mean, low, high = macro_difference(scores, mixed, best)
    facts = {"ensemble": mixed, "expert": best, "n": len(questions), "mean": mean, "low": low, "high": high}
    paths.append(args.output / "paired.json")
    write_atomically(paths[-1], lambda file: file.write_text(json.dumps(facts) + "\n", encoding="utf-8"))
    screen = console()
    try:
        paths.append(plot_top_k(scores, ensemble.names, args.output / "top_k.png"))
    except ImportError as error:
        screen.print(f"no plot: {error}", highlight=False)
    screen.print(terminal(scores))
    screen.print(
        f"{mixed} - {best} (the best of each by the mean over datasets, chosen on "
        f"{counted(len(questions), 'question')}): "
        f"{100 * mean:+.1f} points, paired 95 % interval {100 * low:+.1f} to {100 * high:+.1f}",
        highlight=False,
    )
    screen.print("wrote " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)
    return 0
