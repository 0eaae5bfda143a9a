"""A training run on disk: enough to go on after a kill, in one safetensors file that is never
half-written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import write_atomically
from .record import differences

STATE_FILE = "moerge_gates.checkpoint.safetensors"
_FORMAT = "moerge-training-state"
_GROUPS = ("values", "exp_avg", "exp_avg_sq", "adam_step", "best")


@dataclass
class TrainingState:
    """Where a run stands after `step` optimizer steps.

    The dicts of tensors are keyed by the parameters' names: `values`; AdamW's `exp_avg`, `exp_avg_sq` and
    `adam_step` (a parameter that never had a gradient has none); `best`, the values at the lowest
    validation loss so far (empty without validation). `losses` has one entry per step, `validation` one per
    evaluated step. `settings` is what must be the same when the run goes on. `kept` is the step of the last state that
    was written.
    """

    settings: dict[str, Any]
    step: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    exp_avg: dict[str, Tensor] = field(default_factory=dict)
    exp_avg_sq: dict[str, Tensor] = field(default_factory=dict)
    adam_step: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int | None = None
    best_loss: float = math.inf
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    kept: int | None = None

    def write(self, path: Path) -> None:
        """Replace `path` by this state, atomically."""
        tensors = {
            f"{group}:{name}": value.detach().cpu().contiguous()
            for group in _GROUPS
            for name, value in getattr(self, group).items()
        }
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        header = {
            "settings": self.settings,
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "validation": self.validation,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": _FORMAT, "version": "1", "state": json.dumps(header)}
        write_atomically(path, lambda file: save_file(tensors, file, metadata))

    @classmethod
    def read(cls, path: Path, *, settings: dict[str, Any], shapes: dict[str, torch.Size]) -> TrainingState:
        """Read `path` for a run with these settings and parameters; ValueError with all that differs."""
        way_out = _way_out(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} is not a training state; {way_out}")
                header = json.loads(metadata["state"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {way_out}") from error

        saved = header["settings"]
        problems = differences(saved, settings)
        groups = {
            group: {key.removeprefix(f"{group}:"): t for key, t in tensors.items() if key.startswith(f"{group}:")}
            for group in _GROUPS
        }
        problems += [f"the value of {name} is missing" for name in shapes.keys() - groups["values"].keys()]
        problems += [f"{name} is not trained now" for name in groups["values"].keys() - shapes.keys()]
        for group in ("values", "exp_avg", "exp_avg_sq", "best"):
            problems += [
                f"{group} of {name}: expected {list(shapes[name])}, got {list(tensor.shape)}"
                for name, tensor in groups[group].items()
                if name in shapes and tensor.shape != shapes[name]
            ]
        if problems:
            raise ValueError(other_run(path, problems))
        return cls(
            settings=saved,
            step=header["step"],
            kept=header["step"],
            best_step=header["best_step"],
            best_loss=math.inf if header["best_loss"] is None else header["best_loss"],
            losses=tensors["losses"].tolist(),
            validation={int(step): loss for step, loss in header["validation"].items()},
            **groups,
        )


def stored_settings(path: Path) -> dict[str, Any] | None:
    """The settings of the run whose state lies in `path`; None where no state can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads(file.metadata()["state"])["settings"]
        return settings if isinstance(settings, dict) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def other_run(path: Path, problems: Sequence[str]) -> str:
    """What to say of a state that belongs to another run than the one that is to go on from it."""
    return f"{path} belongs to another run; {_way_out(path)}:\n- " + "\n- ".join(sorted(problems))


def _way_out(path: Path) -> str:
    return f"pass resume=False (or delete {path}) to start over"
