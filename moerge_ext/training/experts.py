"""Train an expert: a LoRA on every linear layer of a model, saved as a normal PEFT folder."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from ..experts.prompt_notes import note_of_prompt
from ..files.atomic import check_writable, disk_error, permit_as_new
from ..files.kept import check_replaced
from ..models.prompt import PromptFormat
from ..models.stored import MODEL_CONFIG
from ..models.wrappers import trainable_inside
from ..routing.layers import linear_features, replace_module
from ..routing.peft_layers import peft_layers
from ..routing.ran import FirstForward
from ..routing.refusals import no_effect
from .batches import BatchSource, Collate
from .checkpointing import gradients_pass_checkpoints
from .encoding import MAX_LENGTH, prepare
from .frozen import frozen
from .loop import discard_state, fit, kept_step, saving
from .options import TrainingOptions, TrainingResult, finished_before, note_of, number_problems, settings_of
from .random_state import seeded
from .ranks import current_ranks

STATE_FILE = "moerge_expert.checkpoint.safetensors"
CHECKPOINT_FOLDER = ".moerge-train-expert"
WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of a whole model


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
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    validation: Iterable[Any] | None = None,
    eval_every: int = 100,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    resume: bool = False,
    overwrite: bool = False,
    shuffle: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> TrainingResult:
    """Train a PEFT LoRA of `rank` on `model` and save it in `output_dir` (adapter_config.json,
    adapter_model.safetensors).

    The defaults are PHATGOOSE's. Its section 4.1 (arXiv 2402.05859): rank 16 on every linear layer, 1000 steps of
    AdamW at 5e-3, a warmup of 0.06. Its authors' code, of which the paper says nothing: a LoRA scale of 1 / rank (the
    text has plain B A u; GLIDER, arXiv 2410.07172, section 4.1: alpha / rank, alpha usually 1), no weight decay, a
    constant rate after the warmup, no LoRA on the output head. That rate is made for that scale (alpha = rank, PEFT
    users' habit, is better off with a smaller one). The paper's batch is 1024 sequences: accumulate=128 with batches
    of 8.

    `model(**batch).loss` is minimized, whatever the batch holds: text, speech (`input_features`), images. The base is
    left as in `train_gates`, and under torchrun the ranks share the work as there.

    `target_modules` is PEFT's: names, a regular expression, or "all-linear". `data` (batches, features, or rows of text
    with `tokenizer`), `prompt`, `validation`, `accumulate`, `resume` and the state file are as in `train_gates`; the
    default `checkpoint_dir` is `.moerge-train-expert` in `output_dir`, where a finished expert is replaced by
    `overwrite` alone. The model comes back as it was, without PEFT's layers, its buffers bit-identical, also after an
    exception.

    Errors: ImportError with the install line when peft is missing; ValueError as in `train_gates`, for rank
    < 1, for an `output_dir` that is a model's folder, and for a model that already carries PEFT layers.
    """
    target = Path(output_dir)
    check_no_model(target)
    options = TrainingOptions(
        steps=steps, lr=lr, warmup_ratio=warmup_ratio, accumulate=accumulate, weight_decay=weight_decay,
        eval_every=eval_every, seed=seed, checkpoint_dir=Path(checkpoint_dir or target / CHECKPOINT_FOLDER),
        checkpoint_every=checkpoint_every, resume=resume, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    prepared = prepare(
        model, data, validation, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    sources = prepared.sources(batch_size, shuffle, seed)
    targets = target_modules if isinstance(target_modules, str) else sorted(target_modules)
    lora = {"rank": rank, "alpha": alpha, "target_modules": targets}
    note = note_of_prompt(prepared.prompt)
    return _train(trainable_inside(model), target, sources, options, lora, note)


def _train(
    model: nn.Module,
    target: Path,
    sources: tuple[BatchSource, BatchSource | None],
    options: TrainingOptions,
    lora: dict[str, Any],
    note: dict[str, str],
) -> TrainingResult:
    """The expert, trained and saved in `target` with `note` in its header."""
    train, validation = sources
    ranks, file = current_ranks(), target / WEIGHTS
    settings = settings_of(options, train, validation, lora)
    done = ranks.from_first(lambda: finished_before(options, settings, target, file=file, state_file=STATE_FILE))
    if done is not None:
        return done
    with ranks.together():
        check_writable(target)
    with (
        frozen(model) as still,
        gradients_pass_checkpoints(model),
        _peft_model(model, **lora, seed=options.seed) as peft_model,
        FirstForward(model, peft_layers(model), what="layers whose LoRA is trained"),
    ):
        parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
        # the model itself, which holds PEFT's layers: PEFT's wrapper would insist on input_ids, and speech has none
        state = fit(
            model, parameters, train, options, still=still, state_file=STATE_FILE, settings=settings,
            validation=validation, label=f"expert {target.name}",
        )  # fmt: skip
        result = TrainingResult(target, state.step, kept_step(state), state.losses, state.validation)
        with ranks.together(), saving(state, options, STATE_FILE):
            if ranks.first:
                _save_atomically(peft_model, target, note_of(result, settings) | note)
    discard_state(options, STATE_FILE)
    return result


def check_no_model(folder: str | Path) -> None:
    """ValueError for the folder of a whole model: transformers loads an adapter that lies in it with the model, from
    then on and without a word."""
    folder = Path(folder)
    if (folder / MODEL_CONFIG).is_file() and any(file for kind in MODEL_WEIGHTS for file in folder.glob(kind)):
        raise ValueError(
            f"{folder} is the folder of a model ({MODEL_CONFIG} and its weights), which transformers would load with "
            "the adapter in it from then on: name another folder (--output)"
        )


def new_expert(
    model: nn.Module,
    output_dir: str | Path,
    *,
    rank: int = 16,
    alpha: float = 1.0,
    target_modules: str | list[str] = "all-linear",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Save an untrained LoRA (B = 0) as a PEFT folder: where `train_gates(joint=True)` starts from scratch.

    PHATGOOSE, arXiv 2402.05859, appendix A, trains expert and gates together in this way and finds it worse than one
    after the other. rank, alpha, target_modules, overwrite as in `train_expert`; returns the folder. ValueError as
    there.
    """
    check_replaced(Path(output_dir) / WEIGHTS, overwrite=overwrite)
    check_no_model(output_dir)
    with _peft_model(trainable_inside(model), rank, alpha, target_modules, seed) as peft_model:
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
    if problems := number_problems({"alpha": alpha}):
        raise ValueError(problems[0])
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(f"{type(model).__name__} already carries wrapped layers: unload or remove() them first")
    check_targets(model, target_modules)
    excluded = _without_effect(model) if target_modules == "all-linear" else []
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
                exclude_modules=excluded or None,
                # weights stored [in, out], as GPT-2's are
                fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
                task_type=_task_type(model),
            )
            with warnings.catch_warnings():
                # PEFT asks transformers by the name that it had before version 5
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                peft_model = get_peft_model(model, config)
        if without := no_effect(peft_model, peft_layers(peft_model)):
            raise ValueError(
                "a LoRA cannot be trained on these layers, which target_modules names:\n- "
                + "\n- ".join(f"{path.removeprefix('base_model.model.')}: {why}" for path, why in without.items())
            )
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


def check_targets(model: nn.Module, target_modules: str | list[str]) -> None:
    """ValueError when no layer is meant by `target_modules`, with the names there are; a warning for names of a list
    that mean none."""
    if target_modules == "all-linear":
        return
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    paths = [path for path, _ in model.named_modules() if path]

    def meant(targets: str | list[str]) -> bool:
        config = LoraConfig(target_modules=targets)
        try:
            return any(check_target_module_exists(config, path) for path in paths)
        except re.error as error:
            said = f"target_modules (--target-modules) must be names or a regular expression, got {targets!r}"
            raise ValueError(f"{said} ({error})") from None

    names = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    lost = [name for name in names if not meant(name if isinstance(target_modules, str) else [name])]
    if not lost:
        return
    leaves = {path.rpartition(".")[2]: None for path, module in model.named_modules() if linear_features(module)}
    said = f"target_modules (--target-modules) {', '.join(lost)}: no layer of {type(model).__name__} is called so; "
    said += f"its linear layers are {', '.join(leaves)}"
    if len(lost) == len(names):
        raise ValueError(f"{said}; or leave it out for all but the head")
    warnings.warn(said, stacklevel=2)


def _without_effect(model: nn.Module) -> list[str]:
    """The linear layers that all-linear would take along in vain, which is warned of."""
    found = no_effect(model, [name for name, module in model.named_modules() if linear_features(module)], inside=False)
    kinds: dict[str, list[str]] = {}
    for name, why in found.items():
        kinds.setdefault(why, []).append(name)
    for why, names in kinds.items():
        warnings.warn(f"all-linear leaves out {_some(names)}: {why}", stacklevel=2)
    return list(found)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _task_type(model: nn.Module) -> str | None:
    """What PEFT writes into the config, and the wrapper that it chooses to load the adapter again: the wrappers for
    text insist on input_ids."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None


def _save_atomically(peft_model: Any, target: Path, note: dict[str, str] | None = None) -> None:
    """Let PEFT save beside the target, put `note` into the header of the weights, then move file by file, the config
    last: without it there is no adapter yet."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
            peft_model.save_pretrained(temporary, save_embedding_layers=False)
            if note is not None:
                weights = load_file(Path(temporary) / WEIGHTS)
                save_file(weights, Path(temporary) / WEIGHTS, {"format": "pt", **note})
            files = sorted(Path(temporary).iterdir(), key=lambda file: file.name == "adapter_config.json")
            for file in files:
                permit_as_new(file)
                os.replace(file, target / file.name)
    except Exception as error:
        if (refused := disk_error(error, target)) is not None:
            raise refused from error
        raise
