"""Where a method's routing weight goes on the held-in tasks: to the expert of the task, and to which others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from statistics import fmean
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
TOLD = "glider"  # with the tasks' own instructions
CLAIM = "selects the oracle expert more often than PHATGOOSE on held-in tasks (Figure 2)"


def measure(
    model: nn.Module, tokenizer: Any, pool: ExpertBank, tasks: Sequence[Task], router: Any = None
) -> dict[str, dict[str, float]]:
    """{task: {expert: its share of the weight}}, the mean over tokens and modules, of the tasks that have an expert.

    Of METHOD, with a router of TOLD.
    """
    encoder, found = Encoder(model, tokenizer, prompt=real.FORM), {}
    with patch(model, pool, METHOD if router is None else TOLD) as handle:
        handle.router = router
        for task in (task for task in tasks if task.name in pool.names):
            rows = list(task.rows[:ITEMS])
            features = encoder.features(rows)
            asked = nullcontext() if router is None else handle.queries([row["input"] for row in rows])
            with asked, handle.record(rows=len(features)) as trace, torch.no_grad():
                model(**collate(features, tokenizer.pad_token_id))
            shares = trace.row_share().mean(0).tolist()
            found[task.name] = {name: round(share, 4) for name, share in zip(trace.names, shares, strict=True)}
    return found


def table(results: Results) -> str:
    """A line for each task: its own expert's share, and the two others that got most; of TOLD where it was measured."""
    found, told = results.facts.get("weights", {}), results.facts.get("weights_told", {})
    lines = [f"| task | its own expert | others |{f' of {TOLD}: its own | others |' if told else ''}"]
    lines.append("| --- | ---: | --- |" + " ---: | --- |" * bool(told))
    for task in found:
        lines.append(f"| {task} | " + " | ".join(_cells(task, shares) for shares in (found, told) if shares) + " |")
    also = f" {TOLD} is told the tasks' own instructions." if told else ""
    return (
        "\n".join(lines)
        + f"\n\nOf {METHOD}'s weight, in percent; all alike would be {100 / max(1, len(found)):.0f}.{also}"
    )


def _cells(task: str, shares: Mapping[str, Mapping[str, float]]) -> str:
    own = shares[task]
    others = sorted((name for name in own if name != task), key=own.get, reverse=True)[:2]
    return f"{100 * own[task]:.0f} | {', '.join(f'{name} {100 * own[name]:.0f}' for name in others)}"


def claim(results: Results) -> str:
    """A line of real_claims.py's table: the tasks' own experts stand for the oracle."""
    ours, told = results.facts.get("weights", {}), results.facts.get("weights_told")
    seen = "not run"
    if told:
        more = sum(told[task][task] > ours[task][task] for task in told)
        means = [fmean(shares[task][task] for task in shares) for shares in (told, ours)]
        word = "yes" if more > len(told) / 2 and means[0] > means[1] else "no"
        shares = f"{100 * means[0]:.0f} % of its weight against {100 * means[1]:.0f}"
        seen = f"{word}: {shares}, more on {more} of the tasks"
    return f"| GLIDER | {CLAIM} | {seen} | {f'{len(told)}, {ITEMS}' if told else ''} | |"
