"""Training the router of PELMo with transformers' Trainer."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .router import FORMAT, ROUTER_FILE

CHECKPOINT_FOLDER = ".moerge-train-router"
MULTI, SINGLE = "multi-label", "single-label"


@dataclass(frozen=True)
class RouterResult:
    """`epochs`: one dict of metrics per epoch; `path` the saved router."""

    path: Path
    epochs: list[dict[str, float]]


def train_router(
    base: str,
    questions: Sequence[str],
    labels: Tensor | Sequence[int],
    names: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    validation: tuple[Sequence[str], Tensor | Sequence[int]] | None = None,
    epochs: int = 5,
    lr: float = 2e-5,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
    note: Mapping[str, Any] | None = None,
) -> RouterResult:
    """Fine-tune a transformers sequence classifier to say which experts answer a question right.

    PELMo, ICIC 2024, section 2.2 (there RoBERTa-base). Multi-label: the binary cross-entropy with a label matrix
    [M,N] bool (`label_matrix` makes one), its mean over questions and experts; the paper names no loss, and this is
    transformers' for `multi_label_classification`. Single-label, the baseline of section 3.3, eq. 5: the cross-entropy
    with one expert id per question [M], that of its domain, its mean over questions.

    Args:
        base: folder or hub id of an encoder; the classifier's head is new.
        validation: (questions, labels) of the same kind; the epoch with the best top-1 is kept, else the last.
        resume: go on from the last finished epoch of a killed run, whose checkpoints lie in `.moerge-train-router` in
            `output_dir` and are removed on success.
        note: of `note_of`, kept with the router and compared with how it is used.

    Every epoch reports its loss and top1, the share of questions whose first expert is a right one, on validation or
    (without) training questions. Errors: ValueError for labels that do not match the questions or the experts, and for
    what is out of range; ImportError with the install line without accelerate. Nothing is saved then.
    """
    kind, targets = _targets(questions, labels, names)
    held_out = None
    if validation is not None:
        other, held_targets = _targets(validation[0], validation[1], names)
        if other != kind:
            raise ValueError(f"training labels are {kind}, validation labels {other}: pass the same kind")
        held_out = (list(validation[0]), held_targets)
    check_training(lr, epochs=epochs, batch_size=batch_size, max_length=max_length)
    model, tokenizer = _classifier(base, names, kind, seed)
    target = Path(output_dir)
    checkpoints = target / CHECKPOINT_FOLDER
    if not resume:
        shutil.rmtree(checkpoints, ignore_errors=True)
    encoded = _Encoded(tokenizer, list(questions), targets, max_length)
    evaluated = _Encoded(tokenizer, *held_out, max_length) if held_out else encoded
    options = {"epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed, "progress": progress}
    history = _fit(model, tokenizer, encoded, evaluated, checkpoints, keep_best=held_out is not None, **options)
    facts = {"format": FORMAT, "experts": list(names), "objective": kind, "max_length": max_length, "base": base}
    facts["asked"] = note
    _save(model, tokenizer, facts, target)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return RouterResult(target, history)


def check_training(lr: float, **counts: int) -> None:
    """What `train_router` refuses of its numbers, and accelerate's absence, before there is anything to train on."""
    problems = [f"{name} must be at least 1, got {value}" for name, value in counts.items() if value < 1]
    if not 0 < lr < 1:
        problems.append(f"lr must be in (0, 1), got {lr}")
    if problems:
        raise ValueError("a router cannot be trained: " + "; ".join(problems))
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError('training a router needs accelerate: pip install "moerge_ext[train]"') from error


def check_encoder(base: str) -> None:
    """ValueError when there is no encoder of that name, or no tokenizer; its weights are not read."""
    from transformers import AutoConfig

    from ..models.pretrained import load_tokenizer, location, named

    where, options = location(base)
    with named(base, "encoder"):
        AutoConfig.from_pretrained(where, **options)
    load_tokenizer(base)


def _classifier(base: str, names: Sequence[str], kind: str, seed: int) -> tuple[Any, Any]:
    """(the encoder with a new head for the experts, its tokenizer)."""
    from transformers import AutoModelForSequenceClassification

    from ..models.pretrained import load_tokenizer, location, named

    where, options = location(base)
    with torch.random.fork_rng(devices=[]), named(base, "encoder"):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            where,
            **options,
            problem_type="multi_label_classification" if kind == MULTI else "single_label_classification",
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            ignore_mismatched_sizes=True,
        )
    return model, load_tokenizer(base)


def _targets(questions: Sequence[str], labels: Any, names: Sequence[str]) -> tuple[str, Tensor]:
    labels = torch.as_tensor(labels, device="cpu")
    if not questions:
        raise ValueError("no questions: a router is trained on at least one")
    if labels.dim() == 2:
        if labels.shape != (len(questions), len(names)) or not ((labels == 0) | (labels == 1)).all():
            raise ValueError(
                f"labels must be [M={len(questions)}, N={len(names)}] of 0 and 1, got {list(labels.shape)} "
                f"{labels.dtype}"
            )
        empty = int((labels.sum(1) == 0).sum())
        if empty:
            raise ValueError(f"{empty} questions have no right expert: use label_matrix(...), which gives each one")
        return MULTI, labels.float()
    valid = labels.dim() == 1 and not labels.is_floating_point() and len(labels) == len(questions)
    if not valid or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"single labels must be [M={len(questions)}] expert ids in 0 .. {len(names) - 1}, got {list(labels.shape)} "
            f"{labels.dtype}, {labels.min().item() if labels.numel() else '-'} to "
            f"{labels.max().item() if labels.numel() else '-'}"
        )
    return SINGLE, labels.long()


class _Encoded(torch.utils.data.Dataset):
    """Questions as token ids with their labels."""

    def __init__(self, tokenizer: Any, questions: list[str], labels: Tensor, max_length: int):
        self.rows = tokenizer(questions, truncation=True, max_length=max_length)["input_ids"]
        self.labels = labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i], "labels": self.labels[i].tolist()}


def _top1(prediction: Any) -> dict[str, float]:
    first = torch.as_tensor(prediction.predictions, device="cpu").argmax(1)
    labels = torch.as_tensor(prediction.label_ids, device="cpu")
    right = labels.gather(1, first[:, None])[:, 0] > 0 if labels.dim() == 2 else labels == first
    return {"top1": right.float().mean().item()}


def _fit(model, tokenizer, train, evaluated, checkpoints: Path, *, keep_best: bool, progress: bool, **options):
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=options["epochs"],
        learning_rate=options["lr"],
        per_device_train_batch_size=options["batch_size"],
        per_device_eval_batch_size=options["batch_size"],
        seed=options["seed"],
        warmup_steps=max(1, len(train) // options["batch_size"] // 5),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=keep_best,
        metric_for_best_model="top1" if keep_best else None,
        greater_is_better=True if keep_best else None,
        report_to="none",
        disable_tqdm=not progress,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_top1,
    )
    trainer.remove_callback(PrinterCallback)  # it prints every record; the result holds the epochs
    saved = sorted(checkpoints.glob("checkpoint-*")) if checkpoints.is_dir() else []
    trainer.train(resume_from_checkpoint=bool(saved))
    return [
        {"epoch": row["epoch"], "loss": row["eval_loss"], "top1": row["eval_top1"]}
        for row in trainer.state.log_history
        if "eval_top1" in row
    ]


def _save(model: Any, tokenizer: Any, facts: dict[str, Any], target: Path) -> None:
    """File by file from a folder beside, the description last: without it there is no router yet."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (target / ROUTER_FILE).unlink(missing_ok=True)
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, target / file.name)
        (Path(temporary) / ROUTER_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(Path(temporary) / ROUTER_FILE, target / ROUTER_FILE)
