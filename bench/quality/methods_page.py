"""The tables of docs/methods.md: every row of METHODS with needs, cost and results, the survey's 29 with their fields.

They are written by bench/table.py; results are those of the pool of 16 in bench/results/quality_real_*.jsonl.gz.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from bench.quality import real_answers
from bench.quality.real_scores import Scores
from moerge_ext.methods import METHODS
from moerge_ext.methods.base import HIDDEN_STATES, Method
from moerge_ext.methods.survey import SURVEY
from moerge_ext.methods.whole_models import WHOLE_MODELS

GATES = {
    "sigmoid-gate": "gates: `moerge train-gates`",
    "average-activation": "gates: `moerge train-gates --kind average-activation`",
}
SOURCES = {
    "instruction": "instructions: `moerge describe`",
    "examples": "indexed examples: `moerge describe --index`",
    "ask": "instructions, a language model to ask",
    "few-shot": "a few solved rows of the task",
    "likelihood": "nothing",
}
NONE = "nothing"
ASKED = {
    "instruction": "an instruction by a language model, its embedding",
    "ask": "a question to a language model",
    "few-shot": "a search over a few rows",
    "likelihood": "a pass with every expert",
}
WRITTEN = "{} (zero-shot)"  # the run that stands for a row that was asked with instructions
FIELDS = "training | data | routing data | grain | depth | selection | aggregation | generalization | user data"
SHORT = {"Out-of-Distribution": "OOD", "In-Distribution": "ID"}


def methods(_rows: Sequence[Any], folder: Path) -> str:
    """A line for every row: equation, needs, cost for a token and for a text, results, paper."""
    pools = real_answers.read_all(folder)
    scores = Scores(real_answers.main_pool(pools)) if pools else None
    lines = [
        "| method | what it does | needs | for a token | for a text | held-in | held-out | arXiv |",
        "| --- | --- | --- | --- | --- | ---: | ---: | --- |",
    ]
    for method in METHODS.values():
        found = re.search(r"arXiv (\d+\.\d+)", method.paper)
        paper = f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""
        cells = [f"`{method.name}`", method.summary, needs(method), of_a_token(method), of_a_text(method)]
        lines.append(f"| {' | '.join([*(_safe(c) for c in cells), *results(scores, method.name), paper])} |")
    return "\n".join(lines)


def needs(method: Method) -> str:
    """What a user must have made before."""
    found = [GATES[method.gate_kind]] if method.gate_kind else []
    if method.learned is not None:
        found.append("routers: `moerge train-routers`")
        if method.learned.common is not None:
            found.append(SOURCES["instruction"])
    if method.embedder == HIDDEN_STATES:
        found.append("an index of the base's hidden states: `moerge describe --hidden-layer`")
    elif method.source is not None:
        found.append(SOURCES.get(method.source, "a router: `moerge train-query-router`"))
    elif method.bias is not None:
        found.append("the weights, from you")
    return "; ".join(found) or NONE


def of_a_token(method: Method) -> str:
    """What a layer computes beside its own product."""
    if method.decodes:
        return "1 + E passes of the model"
    if method.routing is None:
        return "a router's weights, E experts" if method.learned is not None else "one LoRA"
    if method.routing.weighting == "score" and method.routing.top_k is None:
        return "the experts with a weight"
    top_k = method.routing.top_k
    count = {None: "E experts", 1: "1 expert"}.get(top_k, f"{top_k} experts")
    return count if method.routing.weighting == "score" else f"E scores, {count}"


def of_a_text(method: Method) -> str:
    if method.embedder == HIDDEN_STATES:
        return "a pass of the base"
    if method.source is None:
        return ""
    return ASKED.get(method.source, "an embedding")


def results(scores: Scores | None, name: str) -> tuple[str, str]:
    """Held-in and held-out means with intervals, "" where the row was not asked."""
    if scores is not None and WRITTEN.format(name) in scores.known:
        name = WRITTEN.format(name)
    known = scores is not None and name in scores.known
    parts = (scores.results.part(part) for part in ("train", "heldout")) if known else ((), ())
    return tuple("{:.0f} ({:.0f}-{:.0f})".format(*scores.mean(name, part)) if part else "" for part in parts)


def survey(_rows: Sequence[Any], _folder: Path) -> str:
    """The survey's 29 with its nine fields, and the rows here."""
    lines = [f"| 3.n | survey | rows here | {FIELDS} |", "| ---: |" + " --- |" * 11]
    known = (*METHODS.values(), *WHOLE_MODELS.values())
    for number, entry in sorted(SURVEY.items()):
        rows = ", ".join(f"`{method.name}`" for method in known if method.survey == number)
        fields = (SHORT.get(value, value) for value in astuple(entry.taxonomy))
        lines.append(f"| {number} | {entry.name} | {rows} | {' | '.join(fields)} |")
    return "\n".join(lines)


def _safe(text: str) -> str:
    return text.replace("|", "\\|")
