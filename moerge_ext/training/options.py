"""How to train, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files.kept import check_replaced
from .batches import BatchSource
from .record import differences, read_record, record_text

# the options on which the result depends; a run can be resumed with other values of the rest
DECIDING = ("steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "eval_every", "seed")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    steps           optimizer steps
    lr              AdamW's rate: lr * min(1, (i + 1) / W) at step i = 0, 1, ..., with W = ceil(warmup_ratio
                    * steps); the code of PHATGOOSE is a step behind, min(1, i / int(warmup_ratio * steps)): its
                    first step has rate 0
    accumulate      micro-batches per step; the gradient is the mean of theirs, whatever their number of
                    tokens
    weight_decay    AdamW's, decoupled
    eval_every      with validation data: evaluate before the first step, after every `eval_every` steps and
                    after the last, and keep the parameters with the lowest loss (of equals the earliest) of those
                    that were trained: before the first step they are measured, and do not compete
    seed            of dropout, and of the shuffle where this library does the batching
    checkpoint_dir  where the state file lies while training; None writes none
    checkpoint_every  steps between two state files
    resume          go on from the state file when there is one; otherwise start over and replace it
    overwrite       replace the result of a run that was finished, which is refused without; None: it never is
    progress        show a bar with the mean loss of the last steps
    """

    steps: int
    lr: float
    warmup_ratio: float = 0.06
    accumulate: int = 1
    weight_decay: float = 0.0
    eval_every: int = 100
    seed: int = 0
    checkpoint_dir: Path | None = None
    checkpoint_every: int = 10
    resume: bool = False
    overwrite: bool | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("steps", "accumulate", "eval_every", "checkpoint_every")
            if getattr(self, name) < 1
        ]
        problems += number_problems(vars(self))
        if self.resume and self.checkpoint_dir is None:
            problems.append("resume=True needs a checkpoint_dir")
        if problems:
            raise ValueError("training cannot start:\n- " + "\n- ".join(problems))

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0)."""
        warmup = math.ceil(self.warmup_ratio * self.steps)
        return self.lr * min(1.0, (step + 1) / warmup) if warmup else self.lr


def number_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers among the options of a training, of those that are there."""
    checks = {
        "lr": (lambda lr: math.isfinite(lr) and lr > 0, "positive and finite"),
        "alpha": (lambda alpha: math.isfinite(alpha) and alpha > 0, "positive and finite"),
        "warmup_ratio": (lambda ratio: 0 <= ratio <= 1, "in [0, 1]"),
        "weight_decay": (lambda decay: math.isfinite(decay) and decay >= 0, "finite and not negative"),
        "seed": (lambda seed: -(2**63) <= seed < 2**63, "a number of 64 bits"),
    }
    return [
        f"{name} must be {expected}, got {options[name]}"
        for name, (fits, expected) in checks.items()
        if options.get(name) is not None and not fits(options[name])
    ]


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. `path` is what it wrote; `losses` the mean micro-batch loss of every step;
    `validation` the loss by step (0: before training); `best_step` the step whose parameters were kept. `already`:
    this very run had been finished before, and `resume=True` found nothing left to do."""

    path: Path
    steps: int
    best_step: int
    losses: list[float]
    validation: dict[int, float]
    already: bool = False


def settings_of(
    options: TrainingOptions, batches: BatchSource, validation: BatchSource | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """All that decides what comes out of a run, and must not change between it and its resumption."""
    deciding = {name: getattr(options, name) for name in DECIDING}
    return deciding | {"validation": validation is not None, **batches.facts(), **facts}


def finished_before(
    options: TrainingOptions,
    settings: dict[str, Any],
    path: Path,
    *,
    file: Path,
    state_file: str,
    replaced: Sequence[Path] | None = None,
) -> TrainingResult | None:
    """The result in `path` of this very run, as its `file` notes it, when `resume` finds nothing left to do.

    ValueError where one of `replaced` (default: `file`) is there, of another run, and nobody says `overwrite`.
    """
    if options.resume and options.checkpoint_dir is not None and (options.checkpoint_dir / state_file).is_file():
        return None  # the run that left it was allowed to begin
    facts, other = read_record(file) if options.resume else None, []
    if facts is not None and not (other := differences(facts["settings"], settings)):
        validation = {int(step): loss for step, loss in facts["validation"].items()}
        return TrainingResult(path, facts["steps"], facts["best_step"], facts["losses"], validation, already=True)
    for there in (file,) if replaced is None else replaced:
        check_replaced(there, f"of other settings ({'; '.join(other)})" if other else "", overwrite=options.overwrite)
    return None


def note_of(result: TrainingResult, settings: dict[str, Any]) -> dict[str, str]:
    """What `finished_before` reads, for the header of the result's file."""
    facts = {name: getattr(result, name) for name in ("steps", "best_step", "losses", "validation")}
    return record_text(settings, facts)
