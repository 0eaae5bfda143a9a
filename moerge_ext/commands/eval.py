"""`moerge eval`: methods on tasks, as a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..evaluation.runs import (
    BASE,
    DERIVED,
    MULTITASK,
    PELMO,
    WHOLE,
    Run,
    ablation,
    check_named,
    parse_runs,
    split_methods,
    with_top_k,
)
from ..evaluation.tasks import METRICS, Task, load_task
from ..files.atomic import check_can_write
from ..files.counting import counted
from ..methods import METHODS, get_method
from ..methods.fixed import PREFIX
from .engine_options import BATCH, TORCH, add_engine, check_engine, check_runs_of, engine_answerers, outline
from .ensemble_options import build_answerers, deciding_answerers, read_configs
from .expert_options import gates_of, load_bank, placed, placing_of, routers_of, with_routers
from .fits import check_fits, check_runs_fit
from .needs import check_needs
from .options import (
    add_tasks_and_model,
    build_routers,
    check_asked,
    check_writer,
    load,
    read_tasks,
    similar_of_task,
)
from .prompt_options import prompt_of
from .results import check_results, keep_arguments
from .terminal import console
from .training_options import add_overwrite

ABLATED = ("glider", "glider_code")
ALONE = Run(MULTITASK, PREFIX + MULTITASK)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_tasks_and_model(parser, experts=False)
    add = parser.add_argument
    add(
        "--methods",
        default="",
        metavar="A,B,...",
        help="rows of `moerge methods` with options as in glider_code/alpha=10, expert:<name>, base, model:DIR "
        "(another model: docs/whole_models.md), pelmo:FILE (with /top_k=K or /expert=NAME: the ensemble of "
        "docs/ensemble.md), " + ", ".join(DERIVED),
    )
    add("--ablation", choices=ABLATED, help="add the rows of GLIDER's ablations of this method")
    add("--multitask", metavar="DIR", help="add the row of this one LoRA, trained on all the experts' data")
    add("--metric", choices=METRICS, help="of all tasks (default: what their meta.json says)")
    add("--sum-log-likelihood", action="store_true", help="rank by the sum over an answer's tokens, not their mean")
    add(
        "--shares",
        action="store_true",
        help="keep with every answer the experts' parts of its routing weight; slower, as the router is recorded",
    )
    add("--cost", action="store_true", help="print what the answers cost as well; results.* have it in any case")
    add("--batch-size", type=int, help="sequences per forward (default: 16), or that vllm is asked at once (1024)")
    add("--max-new-tokens", type=int, help="of generated answers (default: the longest target of the task)")
    add(
        "--calibrate",
        nargs="+",
        default=[],
        metavar="DIR",
        help="held-in tasks whose validation.jsonl sets glider's threshold",
    )
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("moerge-eval"),
        help="answers, tables, chart (default: %(default)s)",
    )
    add_engine(parser)
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    check_engine(args)
    args.batch_size = BATCH[args.engine] if args.batch_size is None else args.batch_size
    check_writer(args)
    gates_of(args)
    trained = routers_of(args)
    check_can_write(args.output)
    tasks = read_tasks(args, metric=args.metric)
    names = [*split_methods(args.methods), args.ablation or ""]
    rows = [METHODS.get(name.split("/")[0]) for name in names]
    if args.calibrate and not any(row is not None and row.router == "instruction" for row in rows):
        raise ValueError("--calibrate is for glider: add it to --methods")
    held_in = [load_task(folder, split="validation", metric="exact_match") for folder in args.calibrate]
    texts = with_top_k(split_methods(args.methods), args.top_k)
    if not texts and not args.ablation and not args.multitask:
        raise ValueError("nothing to evaluate: pass --methods A,B,... or --ablation glider_code")
    check_named(texts)
    check_experts(args, texts)
    check_results(args, "results.json", grows=("methods", "tasks", "ablation", "multitask"))

    from .. import load_experts
    from ..evaluation.asked_routers import check_routers
    from ..evaluation.evaluate import evaluate
    from ..evaluation.report import write
    from ..evaluation.scores import derive
    from ..routing.patch import check_patch

    settings = settings_of(args)
    experts = load_bank(args)
    tell_of_added(texts, experts.names)
    if args.ablation:
        texts += ablation(args.ablation, len(experts))
    runs, derived = parse_runs(texts, experts.names, args.top_k)
    runs = placed(with_routers(runs, trained), args)
    one = load_experts({MULTITASK: args.multitask}, base=args.model) if args.multitask else None
    check_before(args, runs, experts, one, tasks)
    apart = [whole_models(args, runs), read_configs(args, runs)] if args.engine == TORCH else []
    loaded = cache(partial(load if args.engine == TORCH else outline, args))
    routers = build_routers(args, experts, [run.method for run in runs], loaded)
    settings = replace(settings, similar=similar_of_task(args, routers))
    if args.calibrate:
        calibrate(args, routers, held_in, tasks)
    check_routers(runs, routers)
    model, tokenizer = loaded()
    if one is not None:
        check_patch(model, one, ALONE.method, **placing_of(args))
    options = {"output": args.output, "progress": not args.no_progress}
    if args.engine == TORCH:
        whole, configs = apart
        answerers = build_answerers(args, runs, tasks, model, tokenizer, configs)
        answerers |= deciding_answerers(runs, experts, model, tokenizer) | whole
    else:
        answerers = engine_answerers(args, runs, experts, model, tokenizer, routers)
    given = {"routers": routers, "answerers": answerers}
    scores = evaluate(model, tokenizer, experts, runs, tasks, settings, **given, **options) if runs else []
    scores += derive(scores, derived)
    if one is not None:
        scores += evaluate(model, tokenizer, one, placed([ALONE], args), tasks, settings, **options)
    tell(args, scores, derived, [*write(scores, args.output), keep_arguments(args)])
    return 0


def check_before(args: argparse.Namespace, runs: Sequence[Run], experts: Any, one: Any, tasks: list[Task]) -> None:
    """ValueError for what the runs lack, for experts (or the one of --multitask) that do not fit the model, and for
    tasks that cannot be asked, before its weights are read."""
    if args.engine != TORCH:
        check_runs_of(runs)
    check_needs(args, experts, [get_method(run.method) for run in runs if run.method is not None])
    check_asked(args, tasks)
    if args.engine != TORCH:
        return
    check_runs_fit(args, experts, runs)
    if one is not None:
        check_fits(args, one, ALONE.method, {})


def tell_of_added(texts: list[str], names: Sequence[str]) -> None:
    """Say, before it takes its time, which rows are evaluated that nobody has named."""
    derived = [text for text in texts if text in DERIVED]
    added = [name for name in names if PREFIX + name not in texts]
    if derived and added:
        print(
            f"{' and '.join(derived)}: made of the answers of every expert alone, so "
            f"{counted(len(added), 'more row is', 'more rows are')} evaluated, "
            f"{PREFIX}{added[0]}{' ...' if added[1:] else ''}, and in the table",
            flush=True,
        )


def check_experts(args: argparse.Namespace, texts: list[str]) -> None:
    """ValueError where --experts is missing and something routes among them."""
    asked = [text for text in texts if text != BASE and not text.startswith((PELMO, WHOLE))]
    asked += [f"--ablation {args.ablation}"] if args.ablation else []
    if asked and not args.experts:
        raise ValueError(f"--experts is needed for {', '.join(asked)}: without it there is only {BASE}, {WHOLE}DIR, "
                         f"{PELMO}FILE and --multitask")  # fmt: skip


def whole_models(args: argparse.Namespace, runs: list[Run]) -> dict[str, Any]:
    """{label: who answers} of the runs of other models; nothing is loaded yet."""
    from ..evaluation.whole_model import WholeModel
    from ..models.pretrained import usable_device

    device = usable_device(args.device)
    return {run.label: WholeModel(run.model, dtype=args.dtype, device=device) for run in runs if run.model is not None}


def settings_of(args: argparse.Namespace) -> Any:
    """The `Settings` of the arguments."""
    from ..evaluation.evaluate import Settings

    form = prompt_of(args)
    return Settings(
        template=form.template,
        chat=form.chat,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        length_norm=not args.sum_log_likelihood,
        shares=args.shares,
    )


def tell(args: argparse.Namespace, scores: list[Any], derived: list[str], paths: list[Path]) -> None:
    """Print the tables, and what one must know to read them."""
    from ..evaluation.report import terminal, terminal_costs

    screen = console()
    screen.print(terminal(scores))
    if args.cost:
        screen.print(terminal_costs(scores))
    if reused := sum(score.reused for score in scores if score.method not in derived):
        screen.print(
            f"{counted(reused, 'stored answer')} reused (same model, experts and settings by content)", highlight=False
        )
    for name in derived:
        screen.print(f"{name}: {DERIVED[name]}", highlight=False)
    screen.print("wrote " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def calibrate(args: argparse.Namespace, routers: dict[str, Any], known: list[Task], tasks: list[Task]) -> None:
    """Set the threshold of the instruction router from held-in tasks, and draw where it lies, with held-out `tasks`."""
    from ..queries.calibration import calibrate_threshold

    held_in = {task.name: [row["input"] for row in task.rows] for task in known}
    held_out = {task.name: [row["input"] for row in task.rows] for task in tasks if task.part == "heldout"}
    found = calibrate_threshold(routers["instruction"], held_in, held_out)
    print(f"threshold {found.threshold:.4f}, scores in {found.plot(args.output / 'threshold.png')}")
    for task, share in found.own.items():
        print(
            f"{task}: its own expert is the most similar one to {share:.0%} of "
            f"{counted(len(found.held_in[task]), 'query', 'queries')}"
        )
