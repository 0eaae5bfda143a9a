"""`moerge train-router`: PELMo's router from questions and the answers of its experts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..ensemble.config import read_parts
from ..ensemble.questions import Question, domains, split, warn_of_shown
from ..files.atomic import check_can_write
from ..files.counting import counted
from ..files.kept import check_replaced
from .ensemble_options import (
    add_prompts_and_model,
    answering,
    build_ensemble,
    build_judges,
    read_config,
    read_questions,
)
from .options import build_embedder
from .prompt_options import prompt_of
from .training_options import add_overwrite

SIMILAR, DROP = "similar", "drop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments on `parser`."""
    add_prompts_and_model(parser)
    add = parser.add_argument
    add("--router", required=True, metavar="MODEL", help="encoder to fine-tune (the paper: FacebookAI/roberta-base)")
    add("--output", required=True, type=Path, metavar="DIR", help="the router, and the answers it is trained on")
    add("--single-label", action="store_true", help="learn the domain of the rows, an expert, instead")
    add(
        "--nobody-right",
        choices=(SIMILAR, DROP),
        default=SIMILAR,
        help="where no expert is right, answers that are similar to the right one count (--embedder, --theta), or the "
        "question is left out (default: %(default)s, the paper's)",
    )
    add("--theta", type=float, help="similarity above which an answer counts as right there; it is of the --embedder")
    add(
        "--validation-share",
        type=float,
        default=0.1,
        help="of the questions, drawn from every dataset by --seed (default: %(default)s)",
    )
    add("--epochs", type=int, default=5, help="(default: %(default)s)")
    add("--lr", type=float, default=2e-5, help="(default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens of a question (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the training and of the validation share (default: %(default)s)")
    add("--resume", action="store_true", help="go on where a killed training stopped; answers are always kept")
    add_overwrite(parser)


def run(args: argparse.Namespace) -> int:
    """Answers of every expert, labels, the router; returns the exit status."""
    check_can_write(args.output)
    check(args)
    questions = read_questions(args)

    from ..ensemble.router import ROUTER_FILE, note_of
    from ..ensemble.train import CHECKPOINT_FOLDER, check_encoder, check_training, train_router

    if not (args.resume and (args.output / CHECKPOINT_FOLDER).is_dir()):
        check_replaced(args.output / ROUTER_FILE, overwrite=args.overwrite)

    check_training(args.lr, epochs=args.epochs, max_length=args.max_length)
    check_encoder(args.router)
    if args.single_label:
        entries = read_parts(args.prompts)["experts"]
        names = [entry["name"] for entry in entries]
        labels: Any = torch.tensor(domains(questions, names, by_dataset(entries)), device="cpu")
        note = note_of(prompt_of(args))
    else:
        names, questions, labels, note = labels_of(args, questions)
    rest, held = split(questions, args.validation_share, args.seed)
    result = train_router(
        args.router,
        [questions[i].text for i in rest],
        labels[rest],
        names,
        args.output,
        validation=([questions[i].text for i in held], labels[held]) if held else None,
        epochs=args.epochs,
        lr=args.lr,
        max_length=args.max_length,
        seed=args.seed,
        resume=args.resume,
        progress=not args.no_progress,
        note=note,
    )
    where = "validation" if held else "training"
    for epoch in result.epochs:
        print(f"epoch {epoch['epoch']:.0f}: {where} loss {epoch['loss']:.4f}, top-1 {epoch['top1']:.1%}")
    print(f"wrote {result.path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """ValueError for what the labels need and the arguments lack, before any expert is asked."""
    if not 0 <= args.validation_share < 1:
        raise ValueError(f"--validation-share must be in [0, 1), got {args.validation_share:g}")
    if args.theta is not None and not args.embedder:
        raise ValueError("--theta needs --embedder: it is a similarity of that model")
    if args.theta is not None and not -1 <= args.theta <= 1:
        raise ValueError(f"--theta is a cosine and must be in [-1, 1], got {args.theta:g}")
    if args.theta is not None and (args.single_label or args.nobody_right == DROP):
        raise ValueError("--theta is for --nobody-right similar, of the multi-label router")
    if not args.single_label and args.nobody_right == SIMILAR and args.theta is None:
        raise ValueError(
            "where no expert is right, the answers nearest to the right one count: pass --embedder MODEL and --theta "
            "X, the cosine above which one counts (it depends on the embedder and has no default), or leave these "
            "questions out with --nobody-right drop"
        )


def by_dataset(entries: Sequence[dict]) -> dict[str, str]:
    """{dataset: the expert that is made for it}."""
    return {entry["dataset"]: entry["name"] for entry in entries if "dataset" in entry}


def labels_of(args: argparse.Namespace, questions: list[Question]) -> tuple[Any, list[Question], Any, Any]:
    """(experts, questions, labels [M,N], how they were asked) by asking every expert every question."""
    from ..ensemble.judge import final_answer, judged, label_matrix
    from ..ensemble.measure import answers_by_experts, check_lengths
    from ..ensemble.router import note_of
    from ..evaluation.store import alone_in

    judges = build_judges(args, questions)
    config = read_config(args)
    warn_of_shown(questions, config.experts)
    embedder = build_embedder(args, args.device) if args.nobody_right == SIMILAR else None
    ensemble, options = build_ensemble(args, config), answering(args, config)
    texts, golds = [question.text for question in questions], [question.golds for question in questions]
    check_lengths(ensemble, texts, options["max_new_tokens"])
    with alone_in(args.output):
        answers = answers_by_experts(ensemble, texts, **options)
    answers = [[final_answer(answer, config.answer_after) for answer in given] for given in answers]
    judge = [judges[question.dataset] for question in questions]
    asked = counted(len(questions), "question")
    right = judged(judge, texts, answers, golds, progress=not args.no_progress)
    for name, share in zip(ensemble.names, right.float().mean(0).tolist(), strict=True):
        print(f"{name}: right in {share:.1%} of {asked}")
    known = right.any(1).nonzero().flatten().tolist()
    if args.nobody_right == DROP:
        if not known:
            raise ValueError(
                f"no expert is right in any of {asked}: with --nobody-right drop none is left; "
                f"the answers are kept in {args.output}"
            )
        print(f"left out, as no expert is right: {len(questions) - len(known)} of {asked}")
        questions, answers = [questions[i] for i in known], [answers[i] for i in known]
        right, golds = right[known], [golds[i] for i in known]
    else:
        print(f"by similarity, as no expert is right: {len(questions) - len(known)} of {asked}")
    labels = label_matrix(right, answers, golds, ensemble.names, embedder=embedder, theta=args.theta)
    return ensemble.names, questions, labels, note_of(prompt_of(args), config.experts)
