"""The loop that trains a few parameters of a frozen model: gates, or one expert's LoRA.

AdamW at a constant rate after a linear warmup, gradient accumulation, a checkpoint chosen on validation,
and a state file from which a killed run goes on with the same numbers.
"""

from __future__ import annotations

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import Batch, BatchSource, run_model
from .frozen import Frozen
from .options import TrainingOptions
from .random_state import seeded
from .ranks import Ranks, current_ranks
from .state import TrainingState

# steps whose losses the bar averages: that of one step is of few sequences
SMOOTHED = 20


def fit(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: BatchSource,
    options: TrainingOptions,
    *,
    still: Frozen,
    state_file: str,
    settings: dict[str, Any],
    validation: BatchSource | None = None,
    label: str = "training",
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> TrainingState:
    """Train `parameters` of `model` (everything else must be frozen) and leave the chosen values in them.

    `still` holds the rest of the model as it is; `settings` (`settings_of`) must not change between a run and its
    resumption. The caller deletes the state file (`discard_state`) once the result is safe. An interrupt (Ctrl-C)
    keeps the steps that are done; a disk that refuses the file is warned of, and the run goes on. `loss` (model, batch)
    is what is minimized and, in `.eval()` mode, measured; default: `batch_loss`.

    In several processes (torchrun) each computes on its own batches: a step's gradient is the mean over all of them,
    as if one process had accumulated them, and every rank ends with the same state. Rank 0 reads and writes the file.

    Errors: ValueError for data that runs out, a model that returns no loss, a loss that is not finite or depends on
    no parameter, a state file of another run, ranks that were called with different settings, or a call inside
    torch.inference_mode().
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(f"{label}: nothing can be trained inside torch.inference_mode(): leave that block first")
    run = _Run(model, parameters, options, still, validation, label, state_file)
    run.loss = loss or batch_loss
    run.begin(settings)
    try:
        with torch.enable_grad():  # whatever the caller has set
            run.go(batches)
    except KeyboardInterrupt as interrupt:
        run.keep_interrupted(interrupt)
        raise
    if run.state.best:
        run.warn_of_no_gain()
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(run.state.best[name])
    return run.state


class _Run:
    """A run of `fit`."""

    loss: Callable[[nn.Module, Batch], Tensor]

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        options: TrainingOptions,
        still: Frozen,
        validation: BatchSource | None,
        label: str,
        state_file: str,
    ) -> None:
        self.model, self.parameters, self.options, self.still = model, parameters, options, still
        self.validation, self.label = validation, label
        self.ranks = current_ranks()
        self.path = options.checkpoint_dir / state_file if options.checkpoint_dir is not None else None
        self.optimizer = torch.optim.AdamW(list(parameters.values()), lr=options.lr, weight_decay=options.weight_decay)

    def begin(self, settings: dict[str, Any]) -> None:
        """The state to go on from: a new one, or with `resume` that of the file when there is one."""
        shapes = {name: p.shape for name, p in self.parameters.items()}
        alike = {key: value for key, value in settings.items() if key not in ("examples", "data")}  # a rank's own
        self.ranks.alike({**alike, "resume": self.options.resume, "parameters": shapes}, self.label)

        def started() -> TrainingState:
            if self.options.resume and self.path is not None and self.path.is_file():
                return TrainingState.read(self.path, settings=settings, shapes=shapes)
            return TrainingState(settings)

        self.state = self.ranks.from_first(started)
        self.ranks.copy_first(self.parameters.values())
        if self.state.step:
            _restore(self.state, self.parameters, self.optimizer)

    def go(self, batches: BatchSource) -> None:
        """The steps that are left."""
        options, state = self.options, self.state
        stream = batches.stream(skip=state.step * options.accumulate)
        quiet = not (options.progress and self.ranks.first)
        with tqdm(total=options.steps, initial=state.step, desc=self.label, unit="step", disable=quiet) as bar:
            self._evaluate_when_due()
            while state.step < options.steps:
                loss = self._gradients(stream)
                with uninterrupted():
                    self.optimizer.step()
                    torch.clear_autocast_cache()  # the caller's autocast would go on with the values before the step
                    state.step += 1
                    state.losses.append(loss)
                _check_reached(self.parameters, self.optimizer, self.label, state.step)
                self._evaluate_when_due()
                if state.step == options.steps or state.step % options.checkpoint_every == 0:
                    self._keep()
                recent = state.losses[-SMOOTHED:]
                bar.set_postfix_str(f"loss {fmean(recent):.4f}, mean of {len(recent)}", refresh=False)
                bar.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, stream: Iterator[Batch]) -> float:
        """The gradients of a step, over `accumulate` micro-batches of every rank; returns their mean loss."""
        options, step, ranks = self.options, self.state.step, self.ranks
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        with ranks.together():
            for micro in range(options.accumulate):
                batch = next(stream)
                # a seed of its own for every micro-batch: a resumed run drops out what the first would have
                number = (step * options.accumulate + micro) * ranks.size + ranks.rank
                loss += self._backward(batch, (options.seed << 32) + number)
        (loss,) = ranks.mean([loss])
        if not math.isfinite(loss):
            half = any(p.dtype == torch.float16 for group in self.optimizer.param_groups for p in group["params"])
            kind = "train in another type than float16 (experts: --expert-dtype float32), " if half else ""
            raise ValueError(f"the loss of step {step + 1} is {loss}: {kind}lower lr ({options.lr}) or check the data")
        for group in self.optimizer.param_groups:
            ranks.mean_gradients(group["params"])
            group["lr"] = options.rate(step)
        return loss

    def _backward(self, batch: Batch, seed: int) -> float:
        """The loss of one micro-batch over `accumulate`, its gradients added; the frozen model is as before."""
        while True:
            with seeded(self.model, seed):
                part = self.loss(self.model, batch) / self.options.accumulate
                if self.still.settle():
                    continue
                if part.requires_grad:  # else what is trained did not run on this batch
                    part.backward()
            self.still.put_back()
            return part.item()

    def _evaluate_when_due(self) -> None:
        """Evaluates before the first step, after every `eval_every` and after the last, and keeps the best values.

        What was not trained does not compete: gates of zero standardize to zero and would score 0 for every token.
        """
        state, options = self.state, self.options
        due = state.step % options.eval_every == 0 or state.step == options.steps
        if self.validation is None or not due or state.step in state.validation:
            return
        loss = _evaluate(self.model, self.validation, self.still, options, self.ranks, self.loss)
        state.validation[state.step] = loss
        if state.step and loss < state.best_loss:
            state.best_loss, state.best_step = loss, state.step
            state.best = {name: p.detach().clone() for name, p in self.parameters.items()}

    def _keep(self) -> None:
        """Write the state; a disk that refuses is no reason to lose the run."""
        _collect(self.state, self.parameters, self.optimizer)
        if self.path is None or not self.ranks.first:
            return
        try:
            self.state.write(self.path)
            self.state.kept = self.state.step
        except OSError as error:
            warnings.warn(
                f"{self.label}: the state after step {self.state.step} is not kept ({error}); the run goes on, and "
                f"{kept_text(self.state, self.path)}",
                stacklevel=4,
            )

    def warn_of_no_gain(self) -> None:
        """The best step may still be worse than no training at all."""
        start, state = self.state.validation.get(0, math.inf), self.state
        if state.best_loss >= start and self.ranks.first:
            warnings.warn(
                f"{self.label}: validation loss {state.best_loss:.4f} at the best step, {state.best_step}, was "
                f"{start:.4f} before the first: lower lr ({self.options.lr}), or check that the data are alike",
                stacklevel=4,
            )

    def keep_interrupted(self, interrupt: KeyboardInterrupt) -> None:
        """Write what is done, also between two checkpoints, and say how to go on."""
        if self.state.step:
            self._keep()
        if self.path is not None:
            interrupt.add_note(f"{self.label}: {kept_text(self.state, self.path)}")


def kept_text(state: TrainingState, path: Path) -> str:
    """From where a run that ends early could go on."""
    if state.kept is None:
        return f"no state is kept in {path}"
    return f"the state after step {state.kept} is kept in {path}: resume=True (--resume) goes on from it"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside is raised at the end: what is done there must be done whole."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python tells the main thread alone
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: caught.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def _check_reached(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, label: str, step: int
) -> None:
    """ValueError when no parameter has had a gradient: the steps that follow would train nothing."""
    if any(optimizer.state[p] for p in parameters.values()):
        return
    modules = sorted({name.rpartition("/")[0] or name for name in parameters})
    shown = ", ".join(modules[:5]) + (", ..." if len(modules) > 5 else "")
    raise ValueError(
        f"{label}: after step {step} none of {len(parameters)} parameters has a gradient: their modules did not "
        f"run on the data, or the loss does not depend on them ({shown}); is this the model, and the data, that the "
        "adapter is for?"
    )


def kept_step(state: TrainingState) -> int:
    """The step whose parameters a finished run kept: the best on validation, else the last."""
    return state.best_step if state.best_step is not None else state.step


@contextmanager
def saving(state: TrainingState, options: TrainingOptions, state_file: str) -> Iterator[None]:
    """What the disk refuses inside is an error that says from where the run can go on."""
    try:
        yield
    except OSError as error:
        if options.checkpoint_dir is None:
            raise
        kept = kept_text(state, options.checkpoint_dir / state_file)
        raise OSError(error.errno, f"{error.strerror}; {kept}", error.filename) from error


def discard_state(options: TrainingOptions, state_file: str) -> None:
    """Delete the state file, and its folder when nothing else is in it."""
    if options.checkpoint_dir is None or not current_ranks().first:
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


def _evaluate(
    model: nn.Module,
    validation: BatchSource,
    still: Frozen,
    options: TrainingOptions,
    ranks: Ranks,
    loss: Callable[[nn.Module, Batch], Tensor],
) -> float:
    """Mean loss per label (labels of -100 do not count; batches without labels weigh the same) over all ranks,
    dropout off."""
    model.eval()
    total, weight = 0.0, 0.0
    with ranks.together(), torch.no_grad(), seeded(model, options.seed):
        for batch in validation.epoch():
            labels = batch.get("labels") if isinstance(batch, Mapping) else None
            count = float((labels != -100).sum()) if isinstance(labels, Tensor) else 1.0
            if count:
                total += loss(model, batch).item() * count
                weight += count
                still.put_back()
    total, weight = ranks.total([total, weight])
    if not weight:
        raise ValueError("validation is empty: at least one batch with labels is needed")
    return total / weight


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
