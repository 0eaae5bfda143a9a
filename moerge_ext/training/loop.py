"""The loop that trains a few parameters of a frozen model: gates, or one expert's LoRA.

AdamW at a constant rate after a linear warmup, gradient accumulation, a checkpoint chosen on validation,
and a state file from which a killed run goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import Batch, BatchSource, run_model
from .state import TrainingState

# the options on which the result depends; a run can be resumed with other values of the rest
_DECIDING = ("steps", "lr", "warmup_ratio", "accumulate", "weight_decay", "eval_every", "seed")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    steps           optimizer steps
    lr              AdamW's rate: lr * min(1, (i + 1) / W) at step i = 0, 1, ..., with W = ceil(warmup_ratio
                    * steps)
    accumulate      micro-batches per step; the gradient is the mean of theirs, whatever their number of
                    tokens
    weight_decay    AdamW's, decoupled
    eval_every      with validation data: evaluate before the first step, after every `eval_every` steps and
                    after the last, and keep the parameters with the lowest loss (of equals the earliest)
    seed            of dropout, and of the shuffle where this library does the batching
    checkpoint_dir  where the state file lies while training; None writes none
    checkpoint_every  steps between two state files
    resume          go on from the state file when there is one; otherwise start over and replace it
    progress        show a bar with the loss
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
    progress: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("steps", "accumulate", "eval_every", "checkpoint_every")
            if getattr(self, name) < 1
        ]
        if not (math.isfinite(self.lr) and self.lr > 0):
            problems.append(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.warmup_ratio <= 1:
            problems.append(f"warmup_ratio must be in [0, 1], got {self.warmup_ratio}")
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay must not be negative, got {self.weight_decay}")
        if self.resume and self.checkpoint_dir is None:
            problems.append("resume=True needs a checkpoint_dir")
        if problems:
            raise ValueError("training cannot start:\n- " + "\n- ".join(problems))

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0)."""
        warmup = math.ceil(self.warmup_ratio * self.steps)
        return self.lr * min(1.0, (step + 1) / warmup) if warmup else self.lr


@dataclass(frozen=True)
class TrainingResult:
    """What a run did. `path` is what it wrote; `losses` the mean micro-batch loss of every step;
    `validation` the loss by step (0: before training); `best_step` the step whose parameters were kept."""

    path: Path
    steps: int
    best_step: int
    losses: list[float]
    validation: dict[int, float]


def fit(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: BatchSource,
    options: TrainingOptions,
    *,
    state_file: str,
    validation: BatchSource | None = None,
    facts: dict[str, Any] | None = None,
    label: str = "training",
) -> TrainingState:
    """Train `parameters` of `model` (everything else must be frozen) and leave the chosen values in them.

    `facts` are further settings that must not change between a run and its resumption. The caller deletes
    the state file (`discard_state`) once the result is safe. Errors: ValueError for data that runs out, a
    model that returns no loss, a loss that is not finite, or a state file of another run.
    """
    settings = {name: getattr(options, name) for name in _DECIDING}
    settings |= {"validation": validation is not None, **batches.facts(), **(facts or {})}
    path = options.checkpoint_dir / state_file if options.checkpoint_dir is not None else None
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=options.lr, weight_decay=options.weight_decay)
    state = TrainingState(settings)
    if options.resume and path is not None and path.is_file():
        shapes = {name: p.shape for name, p in parameters.items()}
        state = TrainingState.read(path, settings=settings, shapes=shapes)
        _restore(state, parameters, optimizer)

    stream = batches.stream(skip=state.step * options.accumulate)
    bar = tqdm(total=options.steps, initial=state.step, desc=label, unit="step", disable=not options.progress)
    with bar:
        if validation is not None and state.step == 0:
            _select(state, parameters, _evaluate(model, validation))
        for step in range(state.step, options.steps):
            loss = _step(model, optimizer, stream, options, step)
            state.step = step + 1
            state.losses.append(loss)
            last = state.step == options.steps
            if validation is not None and (last or state.step % options.eval_every == 0):
                _select(state, parameters, _evaluate(model, validation))
            if path is not None and (last or state.step % options.checkpoint_every == 0):
                _collect(state, parameters, optimizer)
                state.write(path)
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
    optimizer.zero_grad(set_to_none=True)
    if state.best:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state.best[name])
    return state


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    options: TrainingOptions,
    step: int,
) -> float:
    """One optimizer step over `accumulate` micro-batches; returns their mean loss."""
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for micro in range(options.accumulate):
        batch = next(stream)
        # a seed of its own for every micro-batch: a resumed run drops out what the first would have
        with seeded(model, (options.seed << 32) + step * options.accumulate + micro):
            part = batch_loss(model, batch) / options.accumulate
            part.backward()
        loss += part.item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss of step {step + 1} is {loss}: lower lr ({options.lr}) or check the data")
    for group in optimizer.param_groups:
        group["lr"] = options.rate(step)
    optimizer.step()
    return loss


def kept_step(state: TrainingState) -> int:
    """The step whose parameters a finished run kept: the best on validation, else the last."""
    return state.best_step if state.best_step is not None else state.step


def discard_state(options: TrainingOptions, state_file: str) -> None:
    """Delete the state file, and its folder when nothing else is in it."""
    if options.checkpoint_dir is None:
        return
    (options.checkpoint_dir / state_file).unlink(missing_ok=True)
    if options.checkpoint_dir.is_dir() and not any(options.checkpoint_dir.iterdir()):
        options.checkpoint_dir.rmdir()


def batch_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The scalar loss `model(**batch).loss`, the batch's tensors moved to the model's device."""
    loss = getattr(run_model(model, batch), "loss", None)
    if loss is None:
        raise ValueError(
            f"the model returned no loss: {type(model).__name__}(**batch).loss is None for a batch with keys "
            f"{sorted(batch)}; pass labels"
        )
    return loss


def _evaluate(model: nn.Module, validation: BatchSource) -> float:
    """Mean loss per label (labels of -100 do not count; batches without labels weigh the same), dropout
    off."""
    model.eval()
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for batch in validation.epoch():
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            count = float((labels != -100).sum()) if isinstance(labels, Tensor) else 1.0
            if count:
                total += batch_loss(model, batch).item() * count
                weight += count
    if not weight:
        raise ValueError("validation is empty: at least one batch with labels is needed")
    return total / weight


def _select(state: TrainingState, parameters: dict[str, nn.Parameter], loss: float) -> None:
    state.validation[state.step] = loss
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.best = {name: p.detach().clone() for name, p in parameters.items()}


def _collect(state: TrainingState, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    state.values = {name: p.detach() for name, p in parameters.items()}
    moments = {name: optimizer.state[p] for name, p in parameters.items() if "step" in optimizer.state[p]}
    state.exp_avg = {name: m["exp_avg"] for name, m in moments.items()}
    state.exp_avg_sq = {name: m["exp_avg_sq"] for name, m in moments.items()}
    state.adam_step = {name: m["step"] for name, m in moments.items()}


def _restore(state: TrainingState, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state.values[name])
            if name not in state.adam_step:
                continue
            optimizer.state[p] = {
                "step": state.adam_step[name],
                "exp_avg": state.exp_avg[name].to(p.device),
                "exp_avg_sq": state.exp_avg_sq[name].to(p.device),
            }
    if state.best:
        state.best = {name: value.to(parameters[name].device) for name, value in state.best.items()}


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers inside depend on `seed` alone; the caller's generators are left as they were."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)
        yield
