"""LoraRetriever: an embedder that was trained to bring texts of one task together, and the mean text of every expert.

Zhao et al. 2024, arXiv 2402.09997, section 4.1. With an instruction I put before every text,

    E(e) = mean over m examples x of expert e of E(I + x),       s(x, e) = cos(E(I + x), E(e))

trained by the contrastive loss over texts x, a text x+ of the same task, and x- of every other task:

    -log exp(cos(x, x+) / T) / (exp(cos(x, x+) / T) + sum exp(cos(x, x-) / T))

An expert that comes later needs no training: `index_retriever` takes examples of those that are there.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from ..files.atomic import write_folder_atomically
from ..files.hub import model_options
from .embedder import Embedder
from .text_router import BASE, FILE, Stored, TextRouter, described_experts, embedded, read_stored
from .vectors import unit

INSTRUCTION = "Represent the sentence for similar task retrieval: "
SAMPLES = 12  # per expert
ENCODER, CHECKPOINTS = "encoder", ".moerge-train-retriever"


def train_retriever(
    base: str,
    data: Mapping[str, Sequence[str]],
    experts: ExpertBank,
    output_dir: str | os.PathLike,
    *,
    held_out: Sequence[str] = (),
    instruction: str = INSTRUCTION,
    samples: int = SAMPLES,
    rounds: int = 100,
    lr: float = 2e-5,
    temperature: float = 0.01,
    seed: int = 0,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Fine-tune a sentence-transformers model on texts of the experts' tasks, then index the experts with it.

    Args:
        base: hub id or folder of the model.
        data: {expert: texts of its task}, at least two of every expert, for all experts.
        held_out: experts that are indexed but not trained on (the paper trains on 40 % of them).
        samples: texts per expert in its index; rounds: steps, each with a pair of texts of every task.
        resume: go on from the last checkpoint of a killed run, in `.moerge-train-retriever` of `output_dir`.

    Returns the router's file. ValueError for data that does not fit, a folder with a router, numbers out of range;
    ImportError with the install line.
    """
    target = Path(output_dir)
    described_experts(experts, tuple(data))
    if (target / FILE).exists():
        raise ValueError(f"{target} holds a router already: name another folder; index_retriever(...) adds experts")
    trained = _training_data(data, held_out)
    if not (rounds >= 1 and samples >= 1 and 0 < lr < 1 and temperature > 0):
        raise ValueError(
            f"expected rounds and samples of at least 1, lr in (0, 1), temperature > 0; got {rounds}, {samples}, {lr}, "
            f"{temperature}"
        )
    if not resume:
        shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    model = _fit(base, trained, target / CHECKPOINTS, instruction, rounds, lr, temperature, seed, progress)
    shutil.rmtree(target / ENCODER, ignore_errors=True)  # of a run that was killed before it wrote its router
    write_folder_atomically(target / ENCODER, lambda folder: model.save(str(folder)))
    path = index_retriever(target, data, experts, instruction=instruction, samples=samples, seed=seed)
    shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)
    return path


def _training_data(data: Mapping[str, Sequence[str]], held_out: Sequence[str]) -> dict[str, list[str]]:
    trained = {name: list(texts) for name, texts in data.items() if name not in held_out}
    few = [name for name, texts in data.items() if len(set(texts)) < 2]
    unknown = [name for name in held_out if name not in data]
    if few or unknown or len(trained) < 2 or BASE in data:
        raise ValueError(
            "a retriever is trained on two or more experts with two or more different texts each; got "
            f"{len(trained)} to train on, fewer than two texts for {', '.join(few) or 'none'}, held out but unknown: "
            f"{', '.join(unknown) or 'none'}"
        )
    return trained


def pairs_of(data: Mapping[str, Sequence[str]], rounds: int, seed: int) -> Iterator[tuple[str, str]]:
    """Two different texts of every task, `rounds` times, all tasks of a round one after another."""
    draw = random.Random(seed)
    different = {name: sorted(set(texts)) for name, texts in data.items()}
    for _ in range(rounds):
        for texts in different.values():
            first, second = draw.sample(texts, 2)
            yield first, second


def _fit(
    base: str,
    data: Mapping[str, Sequence[str]],
    checkpoints: Path,
    instruction: str,
    rounds: int,
    lr: float,
    temperature: float,
    seed: int,
    progress: bool,
) -> Any:
    """The trained sentence-transformers model: a batch is a round, so that the other texts are of other tasks."""
    try:
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformer,
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from transformers import PrinterCallback
    except ImportError as error:
        raise ImportError('training a retriever needs its libraries: pip install "moerge_ext[retriever]"') from error
    from ..models.pretrained import named

    options = model_options(base)
    with named(base, "sentence-transformers model"):
        model = SentenceTransformer(base, device=None if torch.cuda.is_available() else "cpu", **options)
    pairs = [(instruction + first, instruction + second) for first, second in pairs_of(data, rounds, seed)]
    rows = Dataset.from_dict({"anchor": [pair[0] for pair in pairs], "positive": [pair[1] for pair in pairs]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=1,
        learning_rate=lr,
        warmup_steps=max(1, rounds // 10),
        per_device_train_batch_size=len(data),
        batch_sampler=_in_order,
        seed=seed,
        save_steps=max(1, rounds // 5),
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=not progress,
        use_cpu=not torch.cuda.is_available(),
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / temperature)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=rows, loss=loss)
    trainer.remove_callback(PrinterCallback)
    saved = sorted(checkpoints.glob("checkpoint-*")) if checkpoints.is_dir() else []
    trainer.train(resume_from_checkpoint=bool(saved))
    return model


def _in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
    """The rows as they come: sentence-transformers' own samplers would put two pairs of a task into a batch."""
    from sentence_transformers import DefaultBatchSampler

    order = torch.utils.data.SequentialSampler(dataset)
    return DefaultBatchSampler(order, batch_size=batch_size, drop_last=drop_last)


def index_retriever(
    folder: str | os.PathLike,
    data: Mapping[str, Sequence[str]],
    experts: ExpertBank,
    *,
    instruction: str | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Path:
    """Write the mean vectors of `experts` from up to `samples` random texts of each, by the encoder of `folder`.

    instruction: default the one it was trained with. ValueError for experts without texts, and for no encoder.
    """
    marks = described_experts(experts, tuple(data))
    if empty := [name for name, texts in data.items() if not texts]:
        raise ValueError(f"expected texts for every expert; none for {', '.join(empty)}")
    instruction = read_stored(folder).facts["instruction"] if instruction is None else instruction
    embedder = own_embedder(folder, instruction)
    names, draw, rows = tuple(data), random.Random(seed), []
    for name in names:
        texts = list(data[name])
        vectors, probe = embedded(embedder, draw.sample(texts, min(samples, len(texts))))
        rows.append(vectors.mean(0))
    tensors = {"centroids": unit(torch.stack(rows)), "probe": probe}
    facts = {"instruction": instruction, "samples": samples}
    return Stored("retriever", names, tensors, facts, marks, embedder.name, embedder.max_length).save(folder)


def own_embedder(folder: str | os.PathLike, instruction: str) -> Embedder:
    """The encoder of a retriever's folder; ValueError when there is none."""
    path = Path(folder) / ENCODER
    if not path.is_dir():
        raise ValueError(f"{folder} has no {ENCODER}: train one with `moerge train-query-router retriever`")
    return Embedder.from_sentence_transformers(str(path), name=f"retriever {Path(folder).name}", prefix=instruction)


class RetrieverRouter(TextRouter):
    """The cosines s(x, e) of texts to all experts."""

    kind = "retriever"

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.embed(texts) @ self.stored.tensors["centroids"][self.order].T
