"""Experts chosen by how similar a text is to embedded examples of their training data.

Affinities s [N,E] come from an `ExampleRouter`; option `neighbours` says what they are:

    n (a number)   mean cosine of the query to the n most similar examples of an expert
    "all"          mean cosine to all its examples
    "centroid"     cosine to the mean of its examples
    "mixture"      probability of the expert under a Gaussian mixture of all experts' examples (scikit-learn)

and `weigh` makes the weights of a sequence from them: pooled over the queries of a task or not, the `keep` best,
uniform, by softmax(s / temperature), or by s / sum(s) with negative s as 0 ("plain"). Weights are used as they are.

    row               neighbours   granularity      keep   weights           aggregation
    retrieval         1            query            1      1                 output
    retrieval_task    1            task (majority)  1      1                 output
    knn               50           query            1      1                 output
    centroid          "centroid"   query            all    softmax, T = 0.1  output
    centroid_factors  "centroid"   query            all    plain             factored
    adapter_soup      "all"        task (mean)      5      uniform           output
    ask_llm           (none)       query            1      1                 output

`retrieval` is the baseline of PHATGOOSE, which embeds 1000 examples per expert with MiniLM-L6; the embedder and the
number of examples are those of the index. `knn` is called nearest-neighbour in the MoErging survey, while Airoboros'
code averages over 50 neighbours; the row does the latter, `neighbours=1` the former. The survey's centroid methods
differ in their embedder (DAM takes the base model's own hidden states: make the index with
`Embedder.from_transformers(base)`) and in merging outputs or factors. AdapterSoup embeds 100 examples per expert and
compares means or a Gaussian mixture (`neighbours="mixture"`); its number of adapters is a choice of its user, here 5 or
as many as there are. `ask_llm` has a language model pick the expert from their instructions (`AskRouter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import Method, Routing, is_finite_number, is_integer
from .given import TAXONOMY as GIVEN_TAXONOMY
from .given import WEIGHTS, as_given, ungated_plan
from .phatgoose import PAPER as PHATGOOSE_PAPER

SURVEY = "A Survey on Model MoErging, arXiv 2408.07057"
POOLS, WEIGHTINGS = (None, "vote", "mean"), ("uniform", "softmax", "plain")


def weigh(affinities: Tensor, options: Mapping[str, Any]) -> Tensor:
    """s [N,E] -> weights [N,E] float32, [1,E] when pooled over a task's queries."""
    scores = affinities.float()
    count = scores.shape[1]
    if options["pool"] == "vote":
        scores = torch.nn.functional.one_hot(scores.argmax(1), count).float()
    if options["pool"] is not None:
        scores = scores.mean(0, keepdim=True)
    keep = count if options["keep"] is None else min(options["keep"], count)
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :keep], ids[:, :keep]
    if options["weights"] == "uniform":
        weights = torch.full_like(values, 1 / keep)
    elif options["weights"] == "softmax":
        weights = (values / options["temperature"]).softmax(1)
    else:
        weights = values.clamp_min(0)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.zeros_like(scores).scatter(1, ids, weights)


def check(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """`Method.finish`: ValueError listing every option that is out of range; top_k follows `keep`."""
    near, keep, problems = options["neighbours"], options["keep"], []
    if near not in ("all", "centroid", "mixture") and not (is_integer(near) and near >= 1):
        problems.append(f"neighbours must be a positive integer, 'all', 'centroid' or 'mixture', got {near!r}")
    if keep is not None and not (is_integer(keep) and keep >= 1):
        problems.append(f"keep must be a positive integer or None (all experts), got {keep!r}")
    if options["pool"] not in POOLS:
        problems.append(f"pool must be None, 'vote' or 'mean', got {options['pool']!r}")
    if options["weights"] not in WEIGHTINGS:
        problems.append(f"weights must be one of {', '.join(WEIGHTINGS)}, got {options['weights']!r}")
    if not (is_finite_number(options["temperature"]) and options["temperature"] > 0):
        problems.append(f"temperature must be positive and finite, got {options['temperature']!r}")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))
    return replace(routing, top_k=1) if keep == 1 and routing.top_k is None else routing


def _row(name: str, summary: str, paper: str, *, aggregation: str = "output", **options: Any) -> Method:
    defaults = {"neighbours": 1, "pool": None, "keep": 1, "weights": "uniform", "temperature": 0.1}
    options = defaults | options
    taxonomy = replace(
        GIVEN_TAXONOMY,
        expert_data="Shared",  # embeddings of training examples leave the contributor
        routing_dataset="Expert",
        input_granularity="Example" if options["pool"] is None else "Task",
        selection="Dense" if options["keep"] is None else "Sparse",
        aggregation="Parameter" if aggregation == "factored" else "Output",
        user_dataset="Zero-Shot" if options["pool"] is None else "Few-Shot",
    )
    return Method(
        name=name,
        summary=summary,
        paper=paper,
        taxonomy=taxonomy,
        plan=ungated_plan,
        routing=WEIGHTS,
        aggregation=aggregation,
        bias=weigh,
        options=options,
        finish=partial(check, method=name),
        source="examples",
        per_task=options["pool"] is not None,
    )


ASK_LLM = Method(
    name="ask_llm",
    summary="the expert that a language model picks from their instructions",
    paper=f"Airoboros and LlamaIndex, in {SURVEY}",
    taxonomy=replace(GIVEN_TAXONOMY, input_granularity="Example", selection="Sparse", user_dataset="Zero-Shot"),
    plan=ungated_plan,
    routing=replace(WEIGHTS, top_k=1),
    bias=as_given,
    source="ask",
)

ROWS = (
    ASK_LLM,
    _row(
        "retrieval",
        "the expert with the example most similar to the query",
        f"{PHATGOOSE_PAPER}, section 4.2, baseline 'Retrieval'",
    ),
    _row(
        "retrieval_task",
        "the expert that is nearest to most queries of a task",
        "Exploring the Benefits of Training Expert Language Models over Instruction Tuning, arXiv 2302.03202",
        pool="vote",
    ),
    _row("knn", "the expert with the 50 most similar examples", f"Airoboros, in {SURVEY}", neighbours=50),
    _row(
        "centroid",
        "all experts by their centroids' similarity to the query",
        f"the centroid routers (Mo'LoRA) of {SURVEY}",
        neighbours="centroid",
        keep=None,
        weights="softmax",
    ),
    _row(
        "centroid_factors",
        "as centroid, plain weights, A and B averaged apart",
        f"the centroid routers that merge (DAM) of {SURVEY}",
        aggregation="factored",
        neighbours="centroid",
        keep=None,
        weights="plain",
    ),
    _row(
        "adapter_soup",
        "a uniform mix of the experts most similar to a task",
        "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models, arXiv 2302.07027",
        neighbours="all",
        pool="mean",
        keep=5,
    ),
)
