"""`moerge train-query-router`: a router of texts, from judged answers of the experts or from their data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.atomic import check_can_write
from ..files.counting import counted
from ..files.kept import check_replaced
from ..files.rows import read_rows
from ..queries.text_router import FILE
from .expert_options import add_experts, add_gates, add_selection, load_bank, pairs
from .model_options import add_model
from .options import add_embedder, build_embedder
from .progress import add_progress
from .training_options import add_overwrite

if TYPE_CHECKING:
    from ..experts.bank import ExpertBank
    from ..queries.judged import Judged

# kind: what only it takes
JUDGED = {
    "benchmark": ("neighbours", "threshold"),
    "zooter": ("beta", "temperature"),
    "routoo": ("cost",),
    "routellm-mf": ("epochs", "seed"),
    "routellm-classifier": ("strong", "weak"),
}
DATA = {"classifier": (), "tfidf": (), "retriever": ("rounds", "held_out", "seed", "resume")}
KINDS = JUDGED | DATA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add = parser.add_argument
    add("kind", choices=tuple(KINDS), help="the router; docs/text_routers.md says what each is")
    add_experts(parser)
    add_model(parser, required=False, more=": for experts whose paths depend on it")
    add_gates(parser)
    add("--output", required=True, type=Path, metavar="DIR", help="the router's folder, for --query-router of `eval`")
    data = parser.add_argument_group("judged answers").add_argument
    data("--answers", type=Path, metavar="DIR", help="the --output of `moerge eval --methods expert:A,expert:B,...`")
    data("--tasks", nargs="+", action="extend", default=[], metavar="DIR", help="with --answers: the tasks evaluated")
    data("--split", default="test", help="with --answers: which <split>.jsonl (default: %(default)s)")
    data("--limit", type=int, metavar="N", help="with --answers: the first N rows, as in `eval`")
    data("--base", action="store_true", help="with --answers: the base's answers too (row base), so that it is chosen")
    data("--judged", type=Path, metavar="FILE", help='JSON lines {"input": ..., "scores": {expert: number}, ...}')
    add = parser.add_argument_group("the experts' data, for classifier, tfidf and retriever").add_argument
    add("--data", action="append", default=[], metavar="NAME=FILE", help="JSON lines of an expert's task; for each")
    group = parser.add_argument_group("of one kind", argument_default=argparse.SUPPRESS)
    group.add_argument("--neighbours", type=int, metavar="K", help="benchmark: questions that are asked (5)")
    group.add_argument("--threshold", type=float, metavar="T", help="benchmark: above which an estimate is right (0.5)")
    group.add_argument("--beta", type=float, help="zooter: part of a question's own rewards beside its tags' (0.3)")
    group.add_argument("--temperature", type=float, metavar="T", help="zooter: what rewards are divided by (1)")
    group.add_argument(
        "--cost", action="append", metavar="NAME=X", help="routoo: what an answer costs; for all or none"
    )
    group.add_argument("--epochs", type=int, help="routellm-mf: (100)")
    group.add_argument("--seed", type=int, help="routellm-mf, retriever: (0)")
    group.add_argument("--rounds", type=int, help="retriever: steps, each with two texts of every task (100)")
    group.add_argument("--held-out", nargs="+", metavar="NAME", help="retriever: experts that are only indexed")
    group.add_argument("--resume", action="store_true", help="retriever: go on where a killed training stopped")
    group.add_argument("--strong", metavar="NAME", help="routellm-classifier: the better expert")
    group.add_argument("--weak", metavar="NAME", help="routellm-classifier: the cheaper one, or base")
    parser.add_argument("--device", default="cpu", help="of the embedder (default: %(default)s)")
    add_overwrite(parser)
    add_progress(parser)
    add_selection(parser)
    add_embedder(parser)


def run(args: argparse.Namespace) -> int:
    """Do what `add_arguments` declared; returns the exit status. ValueError and OSError for what the user can mend."""
    options = own_options(args)
    # an encoder lies beside a retriever, and experts that come later are added to its index
    check_replaced(args.output / FILE, overwrite=None if args.kind == "retriever" else args.overwrite)
    if args.kind in DATA:
        data = read_data(args)
        check_can_write(args.output)
        print(f"wrote {train_on_data(args, data, load_bank(args), options)}")
        return 0
    if args.data or (args.answers is None) == (args.judged is None):
        raise ValueError(f"{args.kind} learns from judged answers: pass --answers DIR with --tasks, or --judged FILE")
    check_can_write(args.output)
    experts = load_bank(args)
    judged = read(args, experts)
    path = train(args, judged, experts, options)
    for name, score in zip(judged.names, judged.scores.mean(0).tolist(), strict=True):
        print(f"{name}: mean score {score:.3f} over {counted(len(judged.texts), 'question')}")
    print(f"wrote {path}")
    return 0


def own_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the kind that were given; ValueError for those of another kind."""
    given = {name for names in KINDS.values() for name in names if hasattr(args, name)}
    if other := sorted(given - set(KINDS[args.kind])):
        raise ValueError(f"{', '.join('--' + name for name in other)} is not for {args.kind}")
    if args.kind == "routellm-classifier" and given != {"strong", "weak"}:
        raise ValueError("routellm-classifier learns for one pair: pass --strong NAME and --weak NAME")
    options = {name: getattr(args, name) for name in given}
    if "cost" in options:
        found = pairs(options.pop("cost"), "--cost", "X")
        try:
            options["costs"] = {name: float(value) for name, value in found.items()}
        except ValueError as error:
            raise ValueError(f"--cost takes NAME=X with a number X: {error}") from error
    return options


def read(args: argparse.Namespace, experts: ExpertBank) -> Judged:
    """The judged answers of the arguments."""
    from ..evaluation.judged_answers import judged_answers
    from ..evaluation.tasks import load_task
    from ..queries.judged import read_judged

    if args.judged is not None:
        return read_judged(args.judged)
    if not args.tasks:
        raise ValueError("--answers needs --tasks DIR ..., the tasks that were evaluated")
    tasks = [load_task(folder, split=args.split, limit=args.limit) for folder in args.tasks]
    return judged_answers(args.answers, tasks, experts.names, base=args.base)


def train(args: argparse.Namespace, judged: Judged, experts: ExpertBank, options: dict[str, Any]) -> Path:
    """Train the kind of router and write it."""
    from ..queries.benchmark import train_benchmark
    from ..queries.routoo import train_routoo
    from ..queries.strong_weak import train_classifier, train_factorization
    from ..queries.zooter import train_zooter

    trainers = {
        "benchmark": train_benchmark,
        "zooter": train_zooter,
        "routoo": train_routoo,
        "routellm-mf": train_factorization,
        "routellm-classifier": train_classifier,
    }
    if args.kind == "routellm-mf":
        options["progress"] = not args.no_progress
    return trainers[args.kind](judged, experts, build_embedder(args, args.device), args.output, **options)


def read_data(args: argparse.Namespace) -> dict[str, list[str]]:
    """{expert: the texts of its file}."""
    files = pairs(args.data, "--data", "FILE")
    if not files or args.answers is not None or args.judged is not None:
        raise ValueError(f"{args.kind} is trained on --data NAME=FILE of every expert, not on judged answers")
    rows = {name: read_rows(Path(file), text=True) for name, file in files.items()}
    return {name: [row.get("input", row.get("text")) for row in found] for name, found in rows.items()}


def train_on_data(
    args: argparse.Namespace, data: dict[str, list[str]], experts: ExpertBank, options: dict[str, Any]
) -> Path:
    """Train one of the kinds that learn from the experts' own data, and write it."""
    from ..queries.classifier import train_classifier_of_data
    from ..queries.retriever import train_retriever
    from ..queries.tfidf import train_tfidf

    if args.kind == "tfidf":
        return train_tfidf(data, experts, args.output)
    if args.kind == "classifier":
        return train_classifier_of_data(data, experts, build_embedder(args, args.device), args.output)
    if not args.embedder:
        raise ValueError("a retriever needs --embedder MODEL, the sentence-transformers model that it begins from")
    return train_retriever(args.embedder, data, experts, args.output, progress=not args.no_progress, **options)
