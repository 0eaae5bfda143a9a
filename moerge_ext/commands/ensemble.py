"""`moerge train-router` and `moerge ensemble`: PELMo from questions to its tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..ensemble.config import read_entries, read_experts
from ..ensemble.judge import JUDGES
from ..files.atomic import write_atomically
from ..files.rows import read_rows
from .options import add_embedder, build_embedder


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Declare what both commands take: model, prompts, questions."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder or hub id of the backbone, with its tokenizer")
    add("--prompts", required=True, type=Path, metavar="FILE", help="the prompt experts: a JSON list, see the README")
    add("--data", required=True, type=Path, metavar="FILE", help='JSON lines {"input": question, "target": answer}')
    add("--judge", choices=tuple(JUDGES), default="exact", help="when an answer is right (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N questions (default: all)")
    add("--max-new-tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends an answer; \\n is a line end; repeatable")
    add("--batch-size", type=int, default=16, help="questions at a time (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the backbone")
    add("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")
    add("--no-progress", action="store_true", help="no progress bar")
    add_embedder(parser)


def check(args: argparse.Namespace) -> list[dict]:
    """The questions; ValueError for arguments out of range."""
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    return read_rows(args.data)[: args.limit]


def build(args: argparse.Namespace) -> Any:
    """The ensemble of --model and --prompts, without a router."""
    from .. import load_experts, patch
    from ..ensemble.mixture import PromptEnsemble
    from ..models.pretrained import load_model, load_tokenizer, usable_device

    experts, loras = read_experts(args.prompts, lambda: build_embedder(args, args.device))
    model = load_model(args.model, dtype=args.dtype, device=usable_device(args.device))
    handle = patch(model, load_experts(loras), method="given", top_k=1) if loras else None
    return PromptEnsemble(model, load_tokenizer(args.model), experts, handle=handle)


def answering(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `answers_of`."""
    return {
        "output": args.output,
        "facts": {"model": args.model, "prompts": read_entries(args.prompts)},
        "batch_size": args.batch_size,
        "progress": not args.no_progress,
        "max_new_tokens": args.max_new_tokens,
        "stop": [text.replace("\\n", "\n") for text in args.stop],
    }


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moerge train-router`."""
    add_shared(parser)
    add = parser.add_argument
    add("--router", required=True, metavar="MODEL", help="encoder to fine-tune (the paper: FacebookAI/roberta-base)")
    add("--output", required=True, type=Path, metavar="DIR", help="the router, and the answers it is trained on")
    add("--single-label", action="store_true", help='learn the "domain" of the rows, an expert\'s name, instead')
    add(
        "--theta", type=float, help="similarity above which an answer counts as right where nobody is (with --embedder)"
    )
    add("--validation-share", type=float, default=0.1, help="of the questions, the last ones (default: %(default)s)")
    add("--epochs", type=int, default=5, help="(default: %(default)s)")
    add("--lr", type=float, default=2e-5, help="(default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens of a question (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on where a killed training stopped; answers are always kept")


def run_train(args: argparse.Namespace) -> int:
    """Answers of every expert, labels, the router; returns the exit status."""
    rows = check(args)
    if not 0 <= args.validation_share < 1:
        raise ValueError(f"--validation-share must be in [0, 1), got {args.validation_share:g}")
    if args.theta is not None and not args.embedder:
        raise ValueError("--theta needs --embedder: it is a similarity of that model")

    from ..ensemble.train import train_router

    questions = [row["input"] for row in rows]
    if args.single_label:
        names = [entry["name"] for entry in read_entries(args.prompts)]
        labels: Any = domains(rows, names)
    else:
        names, labels = labels_of(args, rows)
    held = int(len(rows) * args.validation_share)
    cut = len(rows) - held
    result = train_router(
        args.router,
        questions[:cut],
        labels[:cut],
        names,
        args.output,
        validation=(questions[cut:], labels[cut:]) if held else None,
        epochs=args.epochs,
        lr=args.lr,
        max_length=args.max_length,
        seed=args.seed,
        resume=args.resume,
        progress=not args.no_progress,
    )
    where = "validation" if held else "training"
    for epoch in result.epochs:
        print(f"epoch {epoch['epoch']:.0f}: {where} loss {epoch['loss']:.4f}, top-1 {epoch['top1']:.1%}")
    print(f"wrote {result.path}")
    return 0


def labels_of(args: argparse.Namespace, rows: list[dict]) -> tuple[tuple[str, ...], Any]:
    """(experts, labels [M,N]) by asking every expert every question."""
    from ..ensemble.judge import judged, label_matrix
    from ..ensemble.measure import answers_by_experts

    questions, golds = [row["input"] for row in rows], [row["target"] for row in rows]
    ensemble = build(args)
    answers = answers_by_experts(ensemble, questions, **answering(args))
    right = judged(JUDGES[args.judge], questions, answers, golds)
    for name, share in zip(ensemble.names, right.float().mean(0).tolist(), strict=True):
        print(f"{name}: right in {share:.1%} of {len(rows)} questions")
    embedder = build_embedder(args, args.device) if args.theta is not None else None
    return ensemble.names, label_matrix(right, answers, golds, ensemble.names, embedder=embedder, theta=args.theta)


def domains(rows: list[dict], names: list[str]) -> list[int]:
    """The expert id of every row's "domain"; ValueError for rows without one, and for unknown experts."""
    bad = [i for i, row in enumerate(rows) if row.get("domain") not in names]
    if bad:
        raise ValueError(
            f'a single-label router needs rows with "domain", one of {", ".join(names)}; row {bad[0]} (from 0) has '
            f"{rows[bad[0]].get('domain')!r} ({len(bad)} such rows)"
        )
    return [names.index(row["domain"]) for row in rows]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `moerge ensemble`."""
    add_shared(parser)
    add = parser.add_argument
    add("--router", required=True, type=Path, metavar="DIR", help="from `moerge train-router`")
    add("--single-label-router", type=Path, metavar="DIR", help="from `moerge train-router --single-label`")
    add("--top-k", type=int, nargs="+", metavar="K", help="experts mixed (default: 1 .. 4, or as many as there are)")
    add("--output", type=Path, metavar="DIR", default=Path("moerge-ensemble"), help="(default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """The table, the plot, and the best ensemble against the best expert; returns the exit status."""
    rows = check(args)

    from rich.console import Console

    from ..ensemble.measure import measure, plot_top_k
    from ..ensemble.router import PromptRouter
    from ..evaluation.metrics import paired_difference
    from ..evaluation.report import terminal, write

    router = PromptRouter.load(args.router, device=args.device)
    single = PromptRouter.load(args.single_label_router, device=args.device) if args.single_label_router else None
    ensemble = build(args)
    top_ks = args.top_k or range(1, min(4, len(ensemble.names)) + 1)
    scores = measure(
        ensemble,
        [row["input"] for row in rows],
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
