"""How near routing comes to the best expert of every held-out task, and whether that says how good it is.

PHATGOOSE, section 4.4: KL(oracle || routing), the probabilities of all tokens in all modules averaged first, and its
Pearson correlation over tasks with what the method reaches. GLIDER's Figure 3: the largest global score of a task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from bench.quality import real
from bench.quality.real_answers import Results, items
from bench.quality.real_names import shown_name
from bench.quality.real_routers import Deciders
from bench.quality.real_scores import ORACLE, PREFIX, Scores
from moerge_ext.evaluation.evaluate import Settings
from moerge_ext.evaluation.inspect import inspect, pearson
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import Task

ROWS = ("phatgoose", "average_activation", "arrow_phatgoose")


def best_experts(results: Results, names: Sequence[str]) -> dict[str, str]:
    """{task: the expert that answered most of it}, the first of equals, as in `oracle_dataset`."""
    scores = Scores(results)
    return {name: scores.best(scores.experts, [name]).removeprefix(PREFIX) for name in names}


def single(scores: Scores, tasks: Iterable[str]) -> list[str]:
    """Those of which one expert is better than every other: elsewhere no routing is nearest to the best."""
    found = []
    for task in tasks:
        reached = [scores.mean(row, [task])[0] for row in scores.experts]
        found += [task] * (reached.count(max(reached)) == 1)
    return found


def measure(
    model: nn.Module, tokenizer: Any, deciders: Deciders, tasks: Sequence[Task], best: Mapping[str, str]
) -> dict[str, dict]:
    """{"kl": {row: {task: nats}}, "oracle": {task: expert}, "global": {task: [cosine, expert]}, "threshold"}."""
    runs, settings = [parse_run(row) for row in ROWS], Settings(template=real.TEMPLATE)
    found = inspect(
        model, tokenizer, deciders.pool, runs, tasks, settings, oracles=dict(best), routers=deciders.known()
    )
    divergences: dict[str, dict[str, float]] = {row: {} for row in ROWS}
    for one in found:
        divergences[one.method][one.task] = round(one.divergence, 4)
    router = deciders.told(tasks)["instruction"]
    highest = {}
    for task in tasks:
        value, expert = router.affinities([task.rows[0]["input"]])[0].max(0)
        highest[task.name] = [round(value.item(), 4), router.names[expert]]
    return {"kl": divergences, "oracle": dict(best), "global": highest, "threshold": round(router.threshold, 4)}


def table(results: Results) -> str:
    """A line for each task, the correlations below; nothing where it was not measured."""
    if (known := results.facts.get("nearness")) is None:
        return ""
    scores, kl = Scores(results), known["kl"]
    head = [f"KL of {shown_name(row)}" for row in kl]
    lines = [
        f"| task | best expert | {' | '.join(head)} | largest global score |",
        "| --- | --- |" + " ---: |" * (len(kl) + 1),
    ]
    alone = single(scores, known["oracle"])
    for task, expert in known["oracle"].items():
        value, nearest = known["global"][task]
        cells = [f"{kl[row][task]:.2f}" for row in kl]
        lines.append(
            f"| {task} | {expert}{'' if task in alone else ', no better than others'} | {' | '.join(cells)} | "
            f"{value:.2f}, {nearest} |"
        )
    said = correlations(scores, {row: {task: found[task] for task in alone} for row, found in kl.items()})
    return "\n".join(lines) + f"\n\n{said} GLIDER's threshold here: {known['threshold']:.2f}."


def correlations(scores: Scores, kl: Mapping[str, Mapping[str, float]]) -> str:
    """Over tasks, with what a row reaches, and with how far that is from the best single expert."""
    said = []
    for row, found in kl.items():
        pair = (correlation(scores, row, found), correlation(scores, row, found, ORACLE))
        said.append(f"{shown_name(row)} {' and '.join(map(shown, pair))}")
    return (
        "Pearson of the KL with the share that is right, and with that minus the best expert's, over the tasks with "
        "one best expert: "
        f"{'; '.join(said)}."
    )


def correlation(scores: Scores, row: str, kl: Mapping[str, float], minus: str | None = None) -> float | None:
    reached = [scores.mean(row, [task])[0] - (scores.mean(minus, [task])[0] if minus else 0) for task in kl]
    return pearson(list(kl.values()), reached)


def shown(r: float | None) -> str:
    return "none" if r is None else f"{r:+.2f}"


def claims(scores: Scores) -> list[str]:
    """The papers' claims that this is about, as lines of real_claims.py's table."""
    near = "how near routing is to the oracle's hardly says how good it is: Pearson -0.2 (4.4)"
    apart = (
        "the largest global score is above the threshold for held-in tasks, below it for nearly all others (Figure 3)"
    )
    seen, counted = ["not run", "not run"], ""
    if (known := scores.results.facts.get("nearness")) is not None:
        kl, threshold = known["kl"]["phatgoose"], known["threshold"]
        kl = {task: kl[task] for task in single(scores, kl)}
        r, counted = correlation(scores, "phatgoose", kl), items(scores.results)
        low, high = (math.tanh(math.atanh(r) + side * 1.96 / math.sqrt(len(kl) - 3)) for side in (-1, 1))
        seen[0] = f"{r:+.2f} over {len(kl)} tasks ({low:+.2f} to {high:+.2f})"
        below = sum(value < threshold for value, _ in known["global"].values())
        seen[1] = f"{below} of {len(known['global'])} held-out tasks are below {threshold:.2f}, the threshold here"
    return [
        f"| PHATGOOSE | {near} | {seen[0]} | {counted} | |",
        f"| GLIDER | {apart} | {seen[1]} | | |",
    ]
