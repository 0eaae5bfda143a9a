"""Train the gates of one expert: a vector per LoRA module that learns which tokens the expert is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..experts.formats.peft import WEIGHTS_FILE
from ..experts.gates import gates_file
from ..experts.hub import output_folder
from ..experts.kinds import SIGMOID_GATE
from ..experts.prompt_notes import note_of_prompt
from ..experts.selection import Modules
from ..files.atomic import check_writable
from ..models.prompt import PromptFormat
from .batches import BatchSource, Collate
from .encoding import MAX_LENGTH, prepare
from .gated_lora import GatedModel, gated_model
from .loop import discard_state, fit, kept_step, saving
from .options import TrainingOptions, TrainingResult, finished_before, note_of, settings_of
from .ranks import current_ranks
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
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    joint: bool = False,
    modules: Modules = None,
    output_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    overwrite: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train one gate v [D] per LoRA module of an expert and write them beside its adapter.

        y_t = W u_t + s B A u_t * sigmoid(v . u_t)             PHATGOOSE, arXiv 2402.05859, section 3

    W, A and B are frozen, v starts at zero; AdamW without weight decay, linear warmup, then a constant rate. The paper
    takes 100 steps of 1024 sequences of at most 512 tokens: accumulate=128 with batches of 8.

    model           the base the adapter was trained on; `model(**batch).loss` is minimized. It is as before afterwards,
                    also after an exception; autocast, checkpointing and dropout are as the caller set them
    adapter_folder  a LoRA folder (or file, or hub id, which need `output_dir`), where the gates go without it
    data            an iterable of ready batches (dicts of tensors), begun again when it ends; with `tokenizer` rows of
                    text; with `collate_fn` a list or Dataset of features. The latter two are cut into batches of
                    `batch_size` and, under `shuffle`, shuffled every epoch from `seed`
    tokenizer       for rows {"input": str, "target": str} (loss on the target), {"text": str}, or TRL's {"prompt",
                    "completion"} and {"messages"} (loss on the completion, on the last message), cut at `max_length`
    prompt          how the inputs of rows are put, noted with what is written; default: as they are
    accumulate      batches per step; its gradient is the mean of theirs, and of all ranks' under torchrun
    validation      the same kind of data: the gates with the lowest loss per label are kept, of those after every
                    `eval_every` steps and after the last (PHATGOOSE, 4.1: every 100); without it the last ones are. The
                    loss before the first step is measured; gates of zero do not compete
    joint           train A and B too (PHATGOOSE, appendix A) and write a whole expert into `output_dir`; from scratch
                    when the adapter is a `new_expert`
    modules         which of the adapter's modules, as for `load_experts`, which is to be told the same: the LoRA of the
                    others is left out here, too
    checkpoint_dir  of the run's state, written every `checkpoint_every` steps and on Ctrl-C, removed on success;
                    default: `.moerge-train-gates` in the output folder
    resume          go on from that state, if any, as if there had been no break, given the same batches in the same
                    order; a run that was finished is not made again (`result.already`)
    overwrite       replace what another run that was finished has written, which is refused without

    Modules that never ran get no gate: a warning names them, `patch` masks the expert there. Errors: ValueError for
    arguments, data or adapter (every problem listed), a loss that is missing, not finite or depends on no gate, a state
    of another run; OSError for a folder that cannot be written, before any work.
    """
    target = _target(adapter_folder, output_dir, joint)
    options = TrainingOptions(
        steps=steps, lr=lr, warmup_ratio=warmup_ratio, accumulate=accumulate, eval_every=eval_every, seed=seed,
        checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER), checkpoint_every=checkpoint_every,
        resume=resume, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    prepared = prepare(
        model, data, validation, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    sources, note = prepared.sources(batch_size, shuffle, seed), note_of_prompt(prepared.prompt)
    return _train(model, adapter_folder, target, sources, options, joint, modules, note)


def _target(adapter_folder: str | Path, output_dir: str | Path | None, joint: bool) -> Path:
    """The folder to write into."""
    if joint and output_dir is None:
        raise ValueError(
            "joint=True (--joint) changes the adapter's weights: pass output_dir (--output), adapter_folder itself and "
            "overwrite=True (--overwrite) to replace them"
        )
    return output_folder(adapter_folder, output_dir)


def _train(
    model: nn.Module,
    folder: str | Path,
    target: Path,
    sources: tuple[BatchSource, BatchSource | None],
    options: TrainingOptions,
    joint: bool,
    modules: Modules,
    note: dict[str, str],
) -> TrainingResult:
    """The gates of the adapter in `folder`, trained and saved in `target` with `note` in their header."""
    train, validation = sources
    ranks, file = current_ranks(), gates_file(target, SIGMOID_GATE)
    with gated_model(model, folder, joint=joint, modules=modules) as gated:
        facts = {"joint": joint, "adapter": None if joint else _fingerprint(gated)}
        facts |= {"modules": None if modules is None else _digest_of_paths(gated)}
        settings = settings_of(options, train, validation, facts)
        replaced = [file, target / WEIGHTS_FILE] if joint else [file]
        done = ranks.from_first(
            lambda: finished_before(options, settings, file, file=file, state_file=STATE_FILE, replaced=replaced)
        )
        if done is not None:
            return done
        with ranks.together():
            check_writable(target)
        state = fit(
            gated.model,
            gated.parameters(),
            train,
            options,
            still=gated.still,
            state_file=STATE_FILE,
            settings=settings,
            validation=validation,
            label=f"gates of {gated.adapter.name}",
        )
        untrained = [path for path in gated.layers if f"{path}/gate" not in state.adam_step]
        result = TrainingResult(file, state.step, kept_step(state), state.losses, state.validation)
        metadata = _metadata(state, options, joint) | note_of(result, settings) | note
        with ranks.together(), saving(state, options, STATE_FILE):
            gated.save(target, metadata=metadata, untrained=untrained)
    discard_state(options, STATE_FILE)
    return result


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


def _digest_of_paths(gated: GatedModel) -> str:
    paths = sorted(gated.layers)
    return f"{len(paths)} ({hashlib.sha256(json.dumps(paths).encode()).hexdigest()[:12]})"


def _fingerprint(gated: GatedModel) -> str:
    """Of the expert the gates are trained with: they are of no use with another."""
    digest = hashlib.sha256()
    for path, weights in sorted(gated.adapter.modules.items()):
        digest.update(f"{path} {getattr(weights, 'scaling', '')!r}".encode())
        for part in weights.parts().values():
            digest.update(part.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
