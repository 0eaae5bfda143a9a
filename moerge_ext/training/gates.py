"""Train the gates of one expert: a vector per LoRA module that learns which tokens the expert is for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from .batches import BatchSource, Collate, as_source
from .gated_lora import GatedModel, gated_model
from .loop import TrainingOptions, TrainingResult, discard_state, fit, kept_step
from .state import STATE_FILE, TrainingState

CHECKPOINT_FOLDER = ".moerge-train-gates"


def train_gates(
    model: nn.Module,
    adapter_folder: str | Path,
    data: Iterable[Any],
    *,
    steps: int = 100,
    lr: float = 5e-3,
    warmup_ratio: float = 0.06,
    batch_size: int = 8,
    accumulate: int = 1,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    joint: bool = False,
    output_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train one gate v [D] per LoRA module of an expert and write them beside its adapter.

        y_t = W u_t + s B A u_t * sigmoid(v . u_t)             PHATGOOSE, arXiv 2402.05859, section 3

    W, A and B are frozen, v starts at zero; AdamW without weight decay, linear warmup, then a constant rate. The paper
    takes 100 steps of 1024 sequences of at most 512 tokens: accumulate=128 with batches of 8.

    model           the base the adapter was trained on; `model(**batch).loss` is minimized. Afterwards it is as before,
                    also after an exception. Autocast and gradient checkpointing are as the caller set them.
    adapter_folder  a PEFT LoRA folder
    data            an iterable of ready batches (dicts of tensors, such as a DataLoader), begun again when it ends; or,
                    with `collate_fn`, a list or Dataset of features, cut into batches of `batch_size` and, under
                    `shuffle`, shuffled every epoch from `seed`
    accumulate      batches per step; its gradient is the mean of theirs
    validation      the same kind of data: the gates with the lowest loss per label are kept, of those before the first
                    step, after every `eval_every` steps and after the last; without it the last ones are
    joint           train A and B too (PHATGOOSE, appendix A) and write a whole expert into `output_dir`, which must be
                    given: `adapter_folder` itself overwrites the adapter
    output_dir      where the gates go; default: `adapter_folder`
    checkpoint_dir  of the run's state, written every `checkpoint_every` steps, removed on success; default:
                    `.moerge-train-gates` in the output folder
    resume          go on from that state, if any, with the result of a run without the break: `data` must give the same
                    batches in the same order

    Errors: ValueError for arguments out of range, an adapter that does not fit the model (every problem listed), data
    that is empty or runs out, no loss or one that is not finite, a state of another run.
    """
    target = _target(adapter_folder, output_dir, joint)
    options = TrainingOptions(
        steps=steps, lr=lr, warmup_ratio=warmup_ratio, accumulate=accumulate, eval_every=eval_every, seed=seed,
        checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER), checkpoint_every=checkpoint_every,
        resume=resume, progress=progress,
    )  # fmt: skip
    batching = {"collate_fn": collate_fn, "batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    return _train(model, Path(adapter_folder), target, as_source(data, validation, **batching), options, joint)


def _target(adapter_folder: str | Path, output_dir: str | Path | None, joint: bool) -> Path:
    """The folder to write into."""
    if joint and output_dir is None:
        raise ValueError(
            "joint=True changes the adapter's weights: pass output_dir (adapter_folder itself to overwrite it)"
        )
    return Path(output_dir or adapter_folder)


def _train(
    model: nn.Module,
    folder: Path,
    target: Path,
    sources: tuple[BatchSource, BatchSource | None],
    options: TrainingOptions,
    joint: bool,
) -> TrainingResult:
    """The gates of the adapter in `folder`, trained and saved in `target`."""
    train, validation = sources
    with gated_model(model, folder, joint=joint) as gated:
        state = fit(
            model,
            gated.parameters(),
            train,
            options,
            state_file=STATE_FILE,
            validation=validation,
            facts={"joint": joint, "adapter": None if joint else _fingerprint(gated)},
            label=f"gates of {gated.adapter.name}",
        )
        path = gated.save(target, metadata=_metadata(state, options, joint))
    discard_state(options, STATE_FILE)
    return TrainingResult(path, state.step, kept_step(state), state.losses, state.validation)


def _metadata(state: TrainingState, options: TrainingOptions, joint: bool) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "steps": options.steps,
        "lr": options.lr,
        "warmup_ratio": options.warmup_ratio,
        "accumulate": options.accumulate,
        "seed": options.seed,
        "joint": str(joint).lower(),
        "best_step": kept_step(state),
        "train_loss": f"{state.losses[-1]:.6g}",
    }
    if state.best_step is not None:
        facts["validation_loss"] = f"{state.best_loss:.6g}"
    return facts


def _fingerprint(gated: GatedModel) -> str:
    """Of the LoRA the gates are trained with: they are of no use with another."""
    digest = hashlib.sha256()
    for path, lora in sorted(gated.adapter.modules.items()):
        digest.update(f"{path} {lora.scaling!r}".encode())
        for factor in (lora.lora_A, lora.lora_B, lora.bias):
            if factor is not None:
                digest.update(factor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
