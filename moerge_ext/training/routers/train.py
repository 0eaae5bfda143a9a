"""Train the routers of a method over a frozen bank of experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...experts.bank import ExpertBank
from ...experts.prompt_notes import note_of_prompt
from ...methods import METHODS, get_method
from ...methods.base import Method
from ...models.prompt import PromptFormat
from ...models.wrappers import trainable_inside
from ..batches import Collate
from ..encoding import MAX_LENGTH, holds_text, prepare
from ..options import TrainingOptions, TrainingResult
from .data import check_data, prepared_by_expert, side_by_side
from .deferral import DeferralRun
from .run import NUMBERS, Run

CHECKPOINT_FOLDER = ".moerge-train-routers"
# where neither the caller nor the method says otherwise
DEFAULTS = {"steps": 250, "lr": 1e-3, "batch_size": 8, "balance": 0.0, "z": 0.0, "dropout": 0.0, "sparsity": 0.0}


def train_routers(
    model: nn.Module,
    experts: ExpertBank,
    data: Iterable[Any] | None,
    output_dir: str | Path,
    *,
    method: str,
    expert_data: Mapping[str, Iterable[Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    balance: float | None = None,
    z: float | None = None,
    dropout: float | None = None,
    sparsity: float | None = None,
    train_experts: bool | None = None,
    warmup_ratio: float = 0.06,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train the routers of `method` over `experts` and write them as `output_dir`/moerge_routers.safetensors.

        y_t = W u_t + sum_e w_e(u_t; router) B_e A_e u_t           the row of `method` says w

    Base and experts are frozen, unless the method (or `train_experts`) trains A and B too, which the file then keeps;
    the folders of the experts are never written. Use the file with `patch(model, experts, method, routers=FILE)`.

    method          a row of `METHODS` that is trained (lora_flow, mole, meteora, ...)
    options         the method's own, such as {"reads": "input"} of mole; those that shape the router go into the file
    data            as in `train_gates`: what the method is trained on, the task's few examples or the experts' own data
                    together; None for pwe_moe, which takes expert_data
    expert_data     {expert: its own data}, for pwe_moe, and for pi_tuning to find the nearest experts
    steps, lr, ...  None takes the method's own
    balance, z, sparsity
                    coefficients of the losses of `objective.py`; dropout: the share of experts that sits out a step
    the rest        as in `train_gates`; the state of an unfinished run lies in `.moerge-train-routers`

    The model is as before afterwards, also after an exception. Errors: ValueError for arguments, data, a method that is
    not trained, and all that `patch` refuses; as in `train_gates` otherwise.
    """
    row = _trained_row(method)
    numbers = {"balance": balance, "z": z, "dropout": dropout, "sparsity": sparsity}
    own = _chosen(row, steps=steps, lr=lr, batch_size=batch_size, **numbers)
    joint = row.learned.experts if train_experts is None else train_experts
    if joint and row.decodes:
        raise ValueError(f"method '{method}' trains a gate beside frozen experts: leave train_experts out")
    target = Path(output_dir)
    training = TrainingOptions(
        steps=own["steps"], lr=own["lr"], warmup_ratio=warmup_ratio, accumulate=accumulate, weight_decay=weight_decay,
        eval_every=eval_every, seed=seed, checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER),
        checkpoint_every=checkpoint_every, resume=resume, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    check_data(row, experts.names, data, expert_data)
    # a method with prompts reads them with the tokenizer, whatever the data are
    of_rows = tokenizer if row.learned.common is None or holds_text(data) else None
    encoding = {"tokenizer": of_rows, "max_length": max_length, "collate_fn": collate_fn, "prompt": prompt}
    by_expert = {} if expert_data is None else prepared_by_expert(model, experts.names, expert_data, **encoding)
    if row.learned.loss == "tasks":
        if validation is not None:
            raise ValueError(f"method '{method}' keeps its last routers: leave validation out")
        sources = side_by_side(by_expert, own["batch_size"], shuffle, seed), None
        note = note_of_prompt(next(iter(by_expert.values())).prompt)
    else:
        prepared = prepare(model, data, validation, **encoding)
        sources, note = prepared.sources(own["batch_size"], shuffle, seed), note_of_prompt(prepared.prompt)
    kind = DeferralRun if row.decodes else Run
    run = kind(row, dict(options or {}), own, joint, target, training, note)
    if by_expert and row.learned.own_data:
        run.choose(trainable_inside(model), experts, by_expert)
    if row.learned.common is not None:
        run.prompt(trainable_inside(model), experts, tokenizer)
    return run.on(trainable_inside(model), experts, sources)


def _trained_row(method: str) -> Method:
    row = get_method(method)
    if row.learned is None:
        known = ", ".join(name for name, other in METHODS.items() if other.learned is not None)
        raise ValueError(f"method '{method}' has no router to train; those that have: {known}")
    return row


def _chosen(row: Method, **given: float | None) -> dict[str, Any]:
    """The caller's numbers, else the method's, else DEFAULTS; ValueError for those out of range."""
    own = DEFAULTS | row.learned.training | {name: value for name, value in given.items() if value is not None}
    if row.decodes and (more := [name for name in NUMBERS if own[name]]):
        raise ValueError(f"method '{row.name}' has one gate, without {' and '.join(more)}: leave that out")
    losses = ("balance", "z", "sparsity")
    problems = [f"{name} must not be negative, got {own[name]}" for name in losses if not own[name] >= 0]
    if not 0 <= own["dropout"] < 1:
        problems.append(f"dropout must be in [0, 1), got {own['dropout']}")
    weigher = row.learned.weigher
    for name in losses:
        if own[name] and weigher is not None and not weigher.softmaxed:
            problems.append(f"{name} is for weights that are a softmax of scores, and those of '{row.name}' are not")
    if problems:
        raise ValueError("train_routers: " + "; ".join(problems))
    return own
