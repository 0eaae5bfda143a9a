"""Gate training inside a transformers `Trainer`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainerCallback


class Gates(Protocol):
    """What the callback asks of a `GatedModel`."""

    def check_target(self, folder: str | Path | None) -> Any: ...

    def snapshot(self) -> dict[str, Tensor]: ...

    def restore(self, gates: dict[str, Tensor]) -> None: ...

    def save(self, folder: str | Path | None, *, metadata: dict[str, Any]) -> Any: ...


class GateTrainerCallback(TrainerCallback):
    """Keeps the gates with the lowest `metric` of the Trainer's evaluations and writes them when training
    ends; an evaluation before the first step does not compete.

    Without an evaluation the last gates are kept. `save=False` only puts the best gates back into the model.
    With a Trainer's own AdamW, set `weight_decay=0` and `lr_scheduler_type="constant_with_warmup"` to train
    as `train_gates` does.
    """

    def __init__(
        self,
        gated: Gates,
        *,
        folder: str | Path | None = None,
        metric: str = "eval_loss",
        save: bool = True,
    ) -> None:
        if save:
            gated.check_target(folder)  # now, not when the training is done
        self.gated = gated
        self.folder = folder
        self.metric = metric
        self.save = save
        self.best_value = math.inf
        self.best_step: int | None = None
        self._best: dict[str, Tensor] | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        value = (metrics or {}).get(self.metric)
        if value is not None and state.global_step and value < self.best_value:
            self.best_value, self.best_step, self._best = value, state.global_step, self.gated.snapshot()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._best is not None:
            self.gated.restore(self._best)
        if self.save:  # on every rank: gates that are sharded are gathered, and rank 0 writes
            facts: dict[str, Any] = {"steps": state.global_step, "lr": args.learning_rate, "seed": args.seed}
            if self.best_step is not None:
                facts |= {"best_step": self.best_step, "validation_loss": self.best_value}
            self.gated.save(self.folder, metadata=facts)
