"""One expert per text, chosen by a router that was trained beforehand on judged answers (`moerge train-query-router`).

    row                      chooses                                             survey
    benchmark_routing        for a task, by its queries' benchmark neighbours    9
    benchmark_routing_query  for a query, likewise                               9
    zooter                   the largest of a distribution taught by rewards     10
    routoo                   the best predicted score within a budget            14
    routellm_mf              strong or weak, by matrix factorization             27
    routellm_classifier      strong or weak, by a classifier                     27

The equations are in `queries/benchmark.py`, `zooter.py`, `routoo.py` and `strong_weak.py`. A router may choose the base
alone, where it was trained on the base's answers too. All but one paper choose among whole models; so can the routers
(`moerge_ext.ModelPool`), while these rows choose among LoRA experts of one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .base import Method, Routing, is_finite_number, is_integer
from .given import WEIGHTS, as_given, ungated_plan
from .survey import SURVEY

ESTIMATORS = ("s1", "s2", "s3", "query")
FROZEN = "a logistic regression over a frozen embedder"
Check = Callable[[Mapping[str, Any]], list[str]]


def checked(routing: Routing, options: Mapping[str, Any], *, method: str, check: Check) -> Routing:
    """`Method.finish`: ValueError listing what `check` finds wrong with the options."""
    if problems := check(options):
        raise ValueError(f"method '{method}': " + "; ".join(problems))
    return routing


def _no_problems(options: Mapping[str, Any]) -> list[str]:
    return []


def _benchmark_problems(options: Mapping[str, Any]) -> list[str]:
    problems = []
    if options["estimator"] not in ESTIMATORS:
        problems.append(f"estimator must be one of {', '.join(ESTIMATORS)}, got {options['estimator']!r}")
    for name in ("neighbours", "queries"):
        if name in options and not (is_integer(options[name]) and options[name] >= 1):
            problems.append(f"{name} must be a positive integer, got {options[name]!r}")
    for name in ("threshold", "confidence"):
        if not (is_finite_number(options[name]) and 0 <= options[name] <= 1):
            problems.append(f"{name} must be between 0 and 1, got {options[name]!r}")
    if not (is_finite_number(options["bandwidth"]) and options["bandwidth"] > 0):
        problems.append(f"bandwidth must be positive, got {options['bandwidth']!r}")
    return problems


def _budget_problems(options: Mapping[str, Any]) -> list[str]:
    budget = options["budget"]
    fine = budget is None or (is_finite_number(budget) and budget >= 0)
    return [] if fine else [f"budget must be a mean cost per answer or None, got {budget!r}"]


def _pair_problems(options: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("strong", "weak"):
        if options[name] is not None and not isinstance(options[name], str):
            problems.append(f"{name} must be the name of an expert, or None, got {options[name]!r}")
    for name in ("threshold", "share"):
        value = options[name]
        if value is None and name == "share":
            continue
        if not (is_finite_number(value) and 0 <= value <= 1):
            problems.append(f"{name} must be between 0 and 1, got {value!r}")
    return problems


def _row(
    name: str, summary: str, paper: str, survey: int, source: str, differs: str, check: Check, **more: Any
) -> Method:
    return Method(
        name=name,
        summary=summary,
        paper=paper,
        taxonomy=SURVEY[survey].taxonomy,
        plan=ungated_plan,
        routing=replace(WEIGHTS, top_k=1),
        bias=as_given,
        finish=partial(checked, method=name, check=check),
        source=source,
        survey=survey,
        differs=differs,
        **more,
    )


BENCHMARK_PAPER = "Large Language Model Routing with Benchmark Datasets, arXiv 2309.15789"
BENCHMARK = {"neighbours": 5, "threshold": 0.5, "bandwidth": 0.1, "confidence": 0.6}
ROUTELLM_PAPER = "RouteLLM: Learning to Route LLMs with Preference Data, arXiv 2406.18665"
PAIR = {"threshold": 0.5, "share": None, "strong": None, "weak": None}

ROWS = (
    _row(
        "benchmark_routing",
        "the expert that was right on the benchmark questions most like a task's",
        BENCHMARK_PAPER,
        9,
        "benchmark",
        "LoRA experts of one model; the bandwidth of s3's kernel is ours",
        _benchmark_problems,
        options={"estimator": "s3", **BENCHMARK, "queries": 1000},
        per_task=True,
        embedder="all-mpnet-base-v2",
    ),
    _row(
        "benchmark_routing_query",
        "the expert that was right on the benchmark questions most like a query",
        BENCHMARK_PAPER,
        9,
        "benchmark",
        "decides for a query, where the survey has a task; LoRA experts of one model",
        _benchmark_problems,
        options={"estimator": "query", **BENCHMARK},
        embedder="all-mpnet-base-v2",
    ),
    _row(
        "zooter",
        "the expert with the largest distilled reward",
        "Routing to the Expert: Efficient Reward-guided Ensemble of Large Language Models, arXiv 2311.08692",
        10,
        "zooter",
        f"{FROZEN}, where the paper fine-tunes mDeBERTa-v3-base; LoRA experts of one model; tasks are the tags where "
        "there are none",
        _no_problems,
    ),
    _row(
        "routoo",
        "the expert with the best predicted score within a budget",
        "Routoo: Learning to Route to Large Language Models Effectively, arXiv 2401.13979",
        14,
        "routoo",
        f"scores are predicted by {FROZEN}, where the paper fine-tunes a language model; the budget is kept by a price "
        "on cost; LoRA experts of one model; no self-play",
        _budget_problems,
        options={"budget": None},
    ),
    _row(
        "routellm_mf",
        "a strong expert where it likely beats a weak one, by matrix factorization",
        f"{ROUTELLM_PAPER}, matrix factorization",
        27,
        "routellm-mf",
        "preferences are judged answers; any embedder, theirs is text-embedding-3-small; LoRA experts of one model",
        _pair_problems,
        options=PAIR,
    ),
    _row(
        "routellm_classifier",
        "a strong expert where it likely beats a weak one, by a classifier",
        f"{ROUTELLM_PAPER}, BERT classifier",
        27,
        "routellm-classifier",
        f"{FROZEN}, where the paper fine-tunes BERT; LoRA experts of one model",
        _pair_problems,
        options=PAIR,
    ),
)
