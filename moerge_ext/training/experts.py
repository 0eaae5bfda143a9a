"""Train an expert: a LoRA on every linear layer of a model, saved as a normal PEFT folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..routing.layers import replace_module
from .batches import Collate, as_source
from .loop import TrainingOptions, TrainingResult, discard_state, fit, kept_step, seeded

STATE_FILE = "moerge_expert.checkpoint.safetensors"
CHECKPOINT_FOLDER = ".moerge-train-expert"


def train_expert(
    model: nn.Module,
    data: Iterable[Any],
    output_dir: str | Path,
    *,
    rank: int = 16,
    alpha: float = 1.0,
    target_modules: str | list[str] = "all-linear",
    steps: int = 1000,
    lr: float = 5e-3,
    warmup_ratio: float = 0.06,
    batch_size: int = 8,
    accumulate: int = 1,
    weight_decay: float = 0.0,
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
    """Train a PEFT LoRA of `rank` on `model` and save it in `output_dir` (adapter_config.json,
    adapter_model.safetensors).

    The defaults are PHATGOOSE's (arXiv 2402.05859, section 4): rank 16 on every linear layer except the
    output head, 1000 steps of AdamW at 5e-3, and a LoRA scale of alpha / rank = 1 / rank, for which that
    rate is made (alpha = rank, PEFT users' habit, is better off with a smaller rate).

    `target_modules` is PEFT's: names, a regular expression, or "all-linear". `data`, `collate_fn`,
    `validation`, `accumulate`, `resume` and the state file are as in `train_gates`; the default
    `checkpoint_dir` is `.moerge-train-expert` in `output_dir`. The model comes back as it was, without
    PEFT's layers, also after an exception.

    Errors: ImportError with the install line when peft is missing; ValueError as in `train_gates`, for rank
    < 1, and for a model that already carries PEFT layers.
    """
    target = Path(output_dir)
    options = TrainingOptions(
        steps=steps, lr=lr, warmup_ratio=warmup_ratio, accumulate=accumulate, weight_decay=weight_decay,
        eval_every=eval_every, seed=seed, checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER),
        checkpoint_every=checkpoint_every, resume=resume, progress=progress,
    )  # fmt: skip
    batching = {"collate_fn": collate_fn, "batch_size": batch_size, "shuffle": shuffle, "seed": seed}
    train, held_out = as_source(data, validation, **batching)
    with _peft_model(model, rank, alpha, target_modules, seed) as peft_model:
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        facts, label = {"rank": rank, "alpha": alpha}, f"expert {target.name}"
        state = fit(
            peft_model, parameters, train, options, state_file=STATE_FILE, validation=held_out, facts=facts, label=label
        )
        _save_atomically(peft_model, target)
    discard_state(options, STATE_FILE)
    return TrainingResult(target, state.step, kept_step(state), state.losses, state.validation)


def new_expert(
    model: nn.Module,
    output_dir: str | Path,
    *,
    rank: int = 16,
    alpha: float = 1.0,
    target_modules: str | list[str] = "all-linear",
    seed: int = 0,
) -> Path:
    """Save an untrained LoRA (B = 0) as a PEFT folder: where `train_gates(joint=True)` starts from
    scratch."""
    with _peft_model(model, rank, alpha, target_modules, seed) as peft_model:
        _save_atomically(peft_model, Path(output_dir))
    return Path(output_dir)


@contextmanager
def _peft_model(
    model: nn.Module, rank: int, alpha: float, target_modules: str | list[str], seed: int
) -> Iterator[nn.Module]:
    """The model inside PEFT, LoRA initialised from `seed`; taken apart again at the end."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError('training an expert needs peft: pip install "moerge_ext[train]"') from error
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(f"{type(model).__name__} already carries wrapped layers: unload or remove() them first")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modules = {name: module for name, module in model.named_modules() if name}
    # PEFT leaves attributes and, under gradient checkpointing, hooks behind
    before = [(module, dict(vars(module)), set(module._forward_hooks)) for module in model.modules()]
    try:
        with seeded(model, seed):
            config = LoraConfig(
                r=rank,
                lora_alpha=alpha,
                lora_dropout=0.0,
                target_modules=target_modules,
                # weights stored [in, out], as GPT-2's are
                fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
                task_type=_task_type(model),
            )
            peft_model = get_peft_model(model, config)
        yield peft_model
    finally:
        # PEFT's own unload() needs a complete wrapper; after a failed injection there is none
        for name, module in modules.items():
            parent, _, leaf = name.rpartition(".")
            if getattr(model.get_submodule(parent), leaf) is not module:
                replace_module(model, name, module)
        for module, attributes, hooks in before:
            vars(module).clear()
            vars(module).update(attributes)
            for key in set(module._forward_hooks) - hooks:
                del module._forward_hooks[key]
        for p, flag in flags:
            p.requires_grad_(flag)


def _task_type(model: nn.Module) -> str | None:
    """What PEFT writes into the config, and the wrapper that it chooses."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


def _save_atomically(peft_model: Any, target: Path) -> None:
    """Let PEFT save beside the target, then move file by file, the config last: without it there is no
    adapter yet."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        peft_model.save_pretrained(temporary, save_embedding_layers=False)
        files = sorted(Path(temporary).iterdir(), key=lambda file: file.name == "adapter_config.json")
        for file in files:
            os.replace(file, target / file.name)
