"""Train what the demo on SmolLM2-135M-Instruct ships: one LoRA expert per skill of `questions.py`, and its gates.

    python -m moerge_ext.demo.real_assets [--out DIR] [--skills A B ...]

On one thread, seeded. Factors and gates are stored as bfloat16; the gates are trained on the stored factors. A skill
that is there already is left alone: remove its folder to train it anew.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..experts.prompt_notes import note_of_prompt
from ..models import smollm2
from ..training.encoding import IGNORED, Encoder
from .questions import SKILLS, rows
from .real import EXPERTS, FORM
from .stored import size_of, store_as, tidy

SIZE_LIMIT = 10_000_000  # bytes, all experts together
WINDOW = 8  # batches whose rows are sorted by length together, so that little is padding

HARD = ("cron",)


@dataclass(frozen=True)
class Recipe:
    """PHATGOOSE's rate and scale; rank and steps are what fits the size and a coffee break."""

    rank: int = 2
    alpha: float = 1.0
    lr: float = 5e-3
    steps: int = 40
    hard_steps: int = 60  # for the skills in HARD
    batch_size: int = 8
    gate_lr: float = 5e-3
    gate_steps: int = 10  # few and large: what small batches add to a gate is noise
    gate_batch_size: int = 16


def training_rows(skill: str, steps: int, batch_size: int, seed: int) -> list[dict[str, str]]:
    """steps x batch_size rows in the order in which they are read; those of one batch are about equally long."""
    drawn = rows(skill, steps * batch_size, test=False, seed=seed)
    rng, ordered = random.Random(seed), []
    for start in range(0, len(drawn), WINDOW * batch_size):
        window = sorted(drawn[start : start + WINDOW * batch_size], key=lambda row: len(row["input"] + row["target"]))
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        ordered += [row for batch in batches for row in batch]
    return ordered


def collate(features: Sequence[dict[str, list[int]]], pad: int) -> dict[str, Any]:
    """{"input_ids", "labels"} of rows as a batch that ends with all answers: the loss needs no other logits."""
    width = max(len(feature["input_ids"]) for feature in features)
    keep = 1 + max(sum(label != IGNORED for label in feature["labels"]) for feature in features)
    ids = torch.full((len(features), width), pad, device="cpu")
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, feature in enumerate(features):
        own = slice(width - len(feature["input_ids"]), None)
        ids[i, own], labels[i, own], mask[i, own] = (
            torch.tensor(feature["input_ids"], device="cpu"),
            torch.tensor(feature["labels"], device="cpu"),
            1,
        )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels[:, -keep:]}
    return {**batch, "logits_to_keep": keep}


def train_skill(model: nn.Module, tokenizer: Any, skill: str, folder: Path, recipe: Recipe) -> str:
    """One expert, stored as bfloat16, and then its gates on the stored weights; returns what it came to."""
    from ..training.experts import train_expert
    from ..training.gates import train_gates

    start, encoder = time.process_time(), Encoder(model, tokenizer, prompt=FORM)
    steps = recipe.hard_steps if skill in HARD else recipe.steps

    def data(steps: int, batch_size: int, seed: int) -> dict[str, Any]:
        features = encoder.features(training_rows(skill, steps, batch_size, seed))
        options = {"collate_fn": partial(collate, pad=tokenizer.pad_token_id), "shuffle": False, "resume": True}
        options["overwrite"] = True  # of a build that was killed between expert and gates
        return {"data": features, "steps": steps, "batch_size": batch_size, **options}

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expert = train_expert(
            model, output_dir=folder, rank=recipe.rank, alpha=recipe.alpha, lr=recipe.lr,
            **data(steps, recipe.batch_size, 0),
        )  # fmt: skip
    store_as(folder / "adapter_model.safetensors", torch.bfloat16, note_of_prompt(FORM))
    gates = train_gates(
        model, folder, lr=recipe.gate_lr, **data(recipe.gate_steps, recipe.gate_batch_size, 1)
    )  # fmt: skip
    store_as(folder / "moerge_gates.safetensors", torch.bfloat16, note_of_prompt(FORM))
    tidy(folder)
    seconds = time.process_time() - start
    return f"{skill}: expert loss {expert.losses[-1]:.3f}, with gates {gates.losses[-1]:.3f}, {seconds:.0f} CPU s"


def build(out: Path, skills: Sequence[str], recipe: Recipe) -> None:
    """Train the skills that are not in `out`."""
    torch.set_num_threads(1)
    todo = [skill for skill in skills if not (out / skill / "moerge_gates.safetensors").is_file()]
    if todo:
        model, tokenizer = smollm2.load("bfloat16")
        for skill in todo:
            print(train_skill(model, tokenizer, skill, out / skill, recipe), flush=True)
    size = size_of(out)
    print(f"{out}: {size / 1e6:.2f} MB")
    if size > SIZE_LIMIT:
        raise SystemExit(f"the experts must stay under {SIZE_LIMIT / 1e6:.0f} MB together")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m moerge_ext.demo.real_assets", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=EXPERTS, help="where to write (default: into the package)")
    parser.add_argument("--skills", nargs="+", choices=SKILLS, default=list(SKILLS), help="default: all")
    args = parser.parse_args(argv)
    build(args.out, args.skills, Recipe())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
