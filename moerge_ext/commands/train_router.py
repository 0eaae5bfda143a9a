"""`moerge train-router`: PELMo's router from questions and the answers of its experts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..ensemble.config import read_entries
from ..ensemble.domains import domains
from ..ensemble.judge import JUDGES
from ..files.atomic import check_can_write
from .options import add_prompts_and_model, answering, build_embedder, build_ensemble, read_questions

SIMILARITY = "pass --embedder MODEL and --theta X, the cosine to the gold answer above which an answer counts as right"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_prompts_and_model(parser)
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


def run(args: argparse.Namespace) -> int:
    """Answers of every expert, labels, the router; returns the exit status."""
    rows = read_questions(args)
    if not 0 <= args.validation_share < 1:
        raise ValueError(f"--validation-share must be in [0, 1), got {args.validation_share:g}")
    check(args, rows)

    from ..ensemble.train import check_encoder, check_training, train_router

    check_training(args.lr, epochs=args.epochs, max_length=args.max_length)
    check_can_write(args.output)
    check_encoder(args.router)
    questions = [row["question"] for row in rows]
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


def check(args: argparse.Namespace, rows: list[dict]) -> None:
    """ValueError for what the labels need and the arguments or the rows lack, before any expert is asked."""
    if args.theta is not None and not args.embedder:
        raise ValueError("--theta needs --embedder: it is a similarity of that model")
    if args.theta is not None and not -1 <= args.theta <= 1:
        raise ValueError(f"--theta is a cosine and must be in [-1, 1], got {args.theta:g}")
    if args.single_label:
        return
    for i, row in enumerate(rows):
        try:
            JUDGES[args.judge](row["question"], row["target"], row["target"])
        except ValueError as error:
            raise ValueError(f"{args.data}, row {i} (from 0): {error}") from error


def labels_of(args: argparse.Namespace, rows: list[dict]) -> tuple[tuple[str, ...], Any]:
    """(experts, labels [M,N]) by asking every expert every question."""
    from ..ensemble.judge import judged, label_matrix
    from ..ensemble.measure import answers_by_experts

    embedder = build_embedder(args, args.device) if args.theta is not None else None
    questions, golds = [row["question"] for row in rows], [row["target"] for row in rows]
    ensemble, options = build_ensemble(args), answering(args)
    if embedder is None and args.batch_size < len(questions):
        # the first batch shows soon what else the last answer would
        first = questions[: args.batch_size]
        answers = answers_by_experts(ensemble, first, **options | {"output": None, "progress": False})
        lost = int((~judged(JUDGES[args.judge], first, answers, golds[: args.batch_size]).any(1)).sum())
        if lost:
            raise ValueError(f"in {lost} of the first {len(first)} questions no expert is right: {SIMILARITY}")
    answers = answers_by_experts(ensemble, questions, **options)
    right = judged(JUDGES[args.judge], questions, answers, golds)
    for name, share in zip(ensemble.names, right.float().mean(0).tolist(), strict=True):
        print(f"{name}: right in {share:.1%} of {len(rows)} questions")
    try:
        return ensemble.names, label_matrix(right, answers, golds, ensemble.names, embedder=embedder, theta=args.theta)
    except ValueError as error:
        if embedder is not None:
            raise
        raise ValueError(f"{error}: {SIMILARITY}; the answers are kept in {args.output}") from error
