"""What the trainings of whole models share: a part of a model is trained in place and a model's folder written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files.atomic import check_writable, disk_error, permit_as_new
from ..models.stored import MODEL_CONFIG
from .batches import Batch, BatchSource
from .checkpointing import gradients_pass_checkpoints
from .frozen import frozen
from .loop import discard_state, fit, kept_step, saving
from .options import TrainingOptions, TrainingResult, finished_before, note_of, settings_of
from .ranks import current_ranks

_MARKED = 512  # values at each end of a parameter, by which a model is known


class WholeRun:
    """One training. `save(folder, note)` writes the model into an empty folder, the note of the run into its file
    `record`; the state of an unfinished run is `state_file`."""

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        target: Path,
        options: TrainingOptions,
        state_file: str,
        record: str,
        save: Callable[[Path, dict[str, str]], None],
    ):
        self.model, self.parameters, self.target, self.options = model, parameters, target, options
        self.state_file, self.record, self.save = state_file, record, save

    def go(
        self,
        sources: tuple[BatchSource, BatchSource | None],
        facts: dict[str, Any],
        *,
        label: str,
        loss: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> TrainingResult:
        """The model, trained and saved in `target`. ValueError for a folder that holds a model already."""
        ranks, options = current_ranks(), self.options
        settings = settings_of(options, *sources, facts)
        done = ranks.from_first(
            lambda: finished_before(
                options,
                settings,
                self.target,
                file=self.target / self.record,
                state_file=self.state_file,
                replaced=[self.target / MODEL_CONFIG],
            )
        )
        if done is not None:
            return done
        with ranks.together():
            check_writable(self.target)
        with frozen(self.model) as still, gradients_pass_checkpoints(self.model), _only(self.model, self.parameters):
            state = fit(
                self.model, self.parameters, sources[0], options, still=still, state_file=self.state_file,
                settings=settings, validation=sources[1], label=label, loss=loss,
            )  # fmt: skip
        result = TrainingResult(self.target, state.step, kept_step(state), state.losses, state.validation)
        with ranks.together(), saving(state, options, self.state_file):
            if ranks.first:
                self._save(note_of(result, settings))
        discard_state(options, self.state_file)
        return result

    def _save(self, note: dict[str, str]) -> None:
        """All files beside the target, then moved one by one, the config last: without it there is no model yet."""
        try:
            with tempfile.TemporaryDirectory(dir=self.target, prefix=".saving-") as temporary:
                self.save(Path(temporary), note)
                for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == MODEL_CONFIG):
                    permit_as_new(file)
                    os.replace(file, self.target / file.name)
        except Exception as error:
            if (refused := disk_error(error, self.target)) is not None:
                raise refused from error
            raise


@contextmanager
def _only(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Inside, only these parameters have gradients; flags and modes are as before afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    ours = {id(p) for p in parameters.values()}
    try:
        for p, _ in flags:
            p.requires_grad_(id(p) in ours)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None
        for module, mode in modes:
            module.training = mode


def mark_of(model: nn.Module) -> str:
    """What a model is known by: the names, shapes and the first and last values of its parameters."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        flat = p.detach().reshape(-1)
        digest.update(f"{name} {list(p.shape)}\n".encode())
        for part in (flat[:_MARKED], flat[-_MARKED:]):
            digest.update(part.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
