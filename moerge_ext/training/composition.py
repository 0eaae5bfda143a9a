"""Train a composition of two models: the cross attention between them (CALM)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..experts.prompt_notes import note_of_prompt
from ..models.prompt import PromptFormat
from ..models.stored import WEIGHTS
from ..models.wrappers import trainable_inside
from .batches import Collate
from .encoding import MAX_LENGTH, prepare
from .options import TrainingOptions, TrainingResult
from .whole import WholeRun, mark_of

STATE_FILE = "moerge_calm.checkpoint.safetensors"
CHECKPOINT_FOLDER = ".moerge-train-calm"


def train_calm(
    model: nn.Module,
    data: Iterable[Any],
    output_dir: str | Path,
    *,
    steps: int = 1000,
    lr: float = 1e-3,
    warmup_ratio: float = 0.06,
    batch_size: int = 8,
    accumulate: int = 1,
    weight_decay: float = 0.0,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train the cross attention of a composition (`compose_models`) and save it as a model in `output_dir`.

    Both models are frozen and their weights not written: the folder names them, with digests by which they are known
    again. The paper (arXiv 2401.02412) trains on examples of the anchor's and of the augmenting model's tasks together;
    steps and rate are ours.

    `model` is trained in place; data, validation, tokenizer, accumulate, resume and the rest as in `train_gates`; the
    state of an unfinished run lies in `.moerge-train-calm`. Errors: ValueError for a model that is no composition, a
    folder with a model in it; as in `train_gates` otherwise.
    """
    model = trainable_inside(model)
    if not hasattr(model, "trained"):
        raise ValueError(
            f"{type(model).__name__} is no composition: make one with moerge_ext.compose_models(anchor, augmenting)"
        )
    target = Path(output_dir)
    options = TrainingOptions(
        steps=steps, lr=lr, warmup_ratio=warmup_ratio, accumulate=accumulate, weight_decay=weight_decay,
        eval_every=eval_every, seed=seed, checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER),
        checkpoint_every=checkpoint_every, resume=resume, progress=progress,
    )  # fmt: skip
    prepared = prepare(
        model, data, validation, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    noted = note_of_prompt(prepared.prompt)

    def save(folder: Path, note: dict[str, str]) -> None:
        model.save_pretrained(folder, metadata=note | noted)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    run = WholeRun(model, model.trained(), target, options, STATE_FILE, WEIGHTS, save)
    return run.go(prepared.sources(batch_size, shuffle, seed), {"model": mark_of(model)}, label="composition")
