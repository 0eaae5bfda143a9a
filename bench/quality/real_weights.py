"""Where a method's routing weight goes on the held-in tasks: to the expert of the task, and to which others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bench.quality import real
from bench.quality.real_answers import Results
from bench.quality.real_batches import collate
from moerge_ext import patch
from moerge_ext.evaluation.tasks import Task
from moerge_ext.experts.bank import ExpertBank
from moerge_ext.training.encoding import Encoder

METHOD, ITEMS = "phatgoose", 8  # questions with their answers, of every task


def measure(model: nn.Module, tokenizer: Any, pool: ExpertBank, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """{task: {expert: its share of the weight}}, the mean over tokens and modules, of the tasks that have an expert."""
    encoder, found = Encoder(model, tokenizer, prompt=real.FORM), {}
    with patch(model, pool, METHOD) as handle:
        for task in (task for task in tasks if task.name in pool.names):
            features = encoder.features(list(task.rows[:ITEMS]))
            with handle.record(rows=len(features)) as trace, torch.no_grad():
                model(**collate(features, tokenizer.pad_token_id))
            shares = trace.row_share().mean(0).tolist()
            found[task.name] = {name: round(share, 4) for name, share in zip(trace.names, shares, strict=True)}
    return found


def table(results: Results) -> str:
    """A line for each task: its own expert's share, and the two others that got most."""
    found = results.facts.get("weights", {})
    lines = ["| task | its own expert | others |", "| --- | ---: | --- |"]
    for task, shares in found.items():
        others = sorted((name for name in shares if name != task), key=shares.get, reverse=True)[:2]
        said = ", ".join(f"{name} {100 * shares[name]:.0f}" for name in others)
        lines.append(f"| {task} | {100 * shares[task]:.0f} | {said} |")
    return (
        "\n".join(lines) + f"\n\nOf {METHOD}'s weight, in percent; all alike would be {100 / max(1, len(found)):.0f}."
    )
