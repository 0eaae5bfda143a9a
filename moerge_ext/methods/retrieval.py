"""Experts chosen by how similar a text is to embedded examples of their training data.

Affinities s [N,E] come from an `ExampleRouter`; option `neighbours` says what they are, over the first `samples`
examples of an expert's index (which is in random order; None: all of them):

    n (a number)   mean cosine of the query to the n most similar examples of an expert
    "all"          mean cosine to all its examples
    "centroid"     cosine to the mean of its examples
    "mixture"      probability of the expert under a Gaussian mixture of all experts' examples (scikit-learn)

and `weigh` makes the weights of a sequence from them: pooled over `queries` texts of a task or not, the `keep` best,
uniform, by softmax(s / temperature) with the largest s first multiplied by `boost`, by its square root, or by
s / sum(s) with negative s as 0 ("plain"). Weights are used as they are.

    row             embedder      samples  neighbours  decides for     keep  weights           applied
    retrieval       MiniLM-L6     1000     1           a query         1     1                 output
    retrieval_task  MiniLM-L6     100      1           32 (majority)   1     1                 output
    knn             any           1000     50          a query         1     1                 output
    centroid        any           all      "centroid"  a query         all   softmax, T = 0.1  output
    dam             hidden states all      "centroid"  a query         2     softmax, T = 0.01 factors
    token_level     MiniLM-L6     all      "centroid"  each new token  all   sqrt of softmax   factors
    adapter_soup    mpnet-base    100      "centroid"  100 (mean)      5     uniform           factors
    ask_llm         (none)        (none)   (none)      a query         1     1                 output

Where paper, survey and code differ, and what these rows do:

- `retrieval`, the baseline of PHATGOOSE: as its section 4.2.
- `retrieval_task`: the authors' code embeds an example with its answer choices, and takes the first 32 of the evaluated
  rows; here it is the input alone, and 32 random rows of the evaluated file (their inputs, never their answers).
- `knn` is called nearest-neighbour in the survey, while Airoboros' code averages over 50 neighbours; the row does the
  latter, `neighbours=1` the former.
- `centroid` are the survey's centroid routers as Mo'LoRA has them; its temperature is ours.
- `dam`: the paper takes the penultimate layer of the base, the published script the fourth from the end (the layer is
  that of the index: `Embedder.from_hidden_states(..., layer=-4)`), beside features of the video that text has not.
  Temperature and top 2 are the script's; the code's defaults are 1 and all. Our centroid is the mean of unit vectors,
  theirs of the vectors as they are.
- `token_level`: the query with what was generated so far is embedded again before every `every`-th token; the paper
  finds 2 best, its code has 1. The code multiplies the largest cosine by 4 ("temperature") before a softmax, and PEFT's
  "linear" merge puts the square root of a weight on each factor: (sum sqrt(w) B)(sum sqrt(w) A).
- `adapter_soup`: as the survey describes it, 100 samples of each expert and of the task are averaged and the averages
  compared; the mean over the queries of their cosines to a centroid orders the experts in the same way, as it is the
  cosine of the averages times one number. Its number of adapters is a choice of its user, here 5 or as many as there
  are; the paper's best selection is the Gaussian mixture (`neighbours="mixture"`), there over hidden states of a
  language model, here over the index. Its experts are bottleneck adapters, these LoRA.
- `ask_llm` has a language model pick the expert from their instructions (`AskRouter`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .base import HIDDEN_STATES, Method, Routing, is_finite_number, is_integer
from .given import WEIGHTS, as_given, ungated_plan
from .phatgoose import PAPER as PHATGOOSE_PAPER
from .survey import PAPER as SURVEY_PAPER
from .survey import SURVEY

POOLS, WEIGHTINGS = (None, "vote", "mean"), ("uniform", "softmax", "sqrt", "plain")
MINILM, MPNET = "all-MiniLM-L6-v2", "all-mpnet-base-v2"


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
    elif options["weights"] in ("softmax", "sqrt"):
        values = torch.cat([options["boost"] * values[:, :1], values[:, 1:]], 1)  # the largest comes first
        weights = (values / options["temperature"]).softmax(1)
        weights = weights.sqrt() if options["weights"] == "sqrt" else weights
    else:
        weights = values.clamp_min(0)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    return torch.zeros_like(scores).scatter(1, ids, weights)


def check(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """`Method.finish`: ValueError listing every option that is out of range; top_k follows `keep`."""
    near, keep, problems = options["neighbours"], options["keep"], []
    if near not in ("all", "centroid", "mixture") and not (is_integer(near) and near >= 1):
        problems.append(f"neighbours must be a positive integer, 'all', 'centroid' or 'mixture', got {near!r}")
    for name, everything in (("keep", "experts"), ("samples", "examples")):
        value = options[name]
        if value is not None and not (is_integer(value) and value >= 1):
            problems.append(f"{name} must be a positive integer or None (all {everything}), got {value!r}")
    for name in ("queries", "every"):
        if name in options and not (is_integer(options[name]) and options[name] >= 1):
            problems.append(f"{name} must be a positive integer, got {options[name]!r}")
    if options["pool"] not in POOLS:
        problems.append(f"pool must be None, 'vote' or 'mean', got {options['pool']!r}")
    if options["weights"] not in WEIGHTINGS:
        problems.append(f"weights must be one of {', '.join(WEIGHTINGS)}, got {options['weights']!r}")
    for name in ("temperature", "boost"):
        if not (is_finite_number(options[name]) and options[name] > 0):
            problems.append(f"{name} must be positive and finite, got {options[name]!r}")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))
    return replace(routing, top_k=1) if keep == 1 and routing.top_k is None else routing


DEFAULTS = {
    "neighbours": 1,
    "samples": None,
    "pool": None,
    "keep": 1,
    "weights": "uniform",
    "temperature": 0.1,
    "boost": 1.0,
}


def _row(
    name: str,
    summary: str,
    paper: str,
    *,
    survey: int,
    differs: str = "",
    embedder: str | None = None,
    aggregation: str = "output",
    **options: Any,
) -> Method:
    options = DEFAULTS | options
    return Method(
        name=name,
        summary=summary,
        paper=paper,
        taxonomy=SURVEY[survey].taxonomy,
        plan=ungated_plan,
        routing=WEIGHTS,
        aggregation=aggregation,
        bias=weigh,
        options=options,
        finish=partial(check, method=name),
        source="examples",
        per_task=options["pool"] is not None,
        embedder=embedder,
        survey=survey,
        differs=differs,
    )


ASK_LLM = Method(
    name="ask_llm",
    summary="the expert that a language model picks from their instructions",
    paper=f"Airoboros and LlamaIndex, in {SURVEY_PAPER}",
    taxonomy=SURVEY[8].taxonomy,
    plan=ungated_plan,
    routing=replace(WEIGHTS, top_k=1),
    bias=as_given,
    source="ask",
    survey=8,
)

ROWS = (
    ASK_LLM,
    _row(
        "retrieval",
        "the expert with the example most similar to the query",
        f"{PHATGOOSE_PAPER}, section 4.2, baseline 'Retrieval'",
        survey=8,
        embedder=MINILM,
        samples=1000,
    ),
    _row(
        "retrieval_task",
        "the expert that is nearest to most queries of a task",
        "Exploring the Benefits of Training Expert Language Models over Instruction Tuning, arXiv 2302.03202",
        survey=2,
        differs="examples are embedded without their answer choices",
        embedder=MINILM,
        samples=100,
        pool="vote",
        queries=32,
    ),
    _row(
        "knn",
        "the expert with the 50 most similar examples",
        f"Airoboros, in {SURVEY_PAPER}",
        survey=8,
        differs="mean of 50 neighbours as in Airoboros' code; the survey's nearest one is row retrieval, neighbours=1",
        neighbours=50,
        samples=1000,
    ),
    _row(
        "centroid",
        "all experts by their centroids' similarity to the query",
        f"the centroid routers (Mo'LoRA) of {SURVEY_PAPER}",
        survey=6,
        differs="centroids of the experts' own data, not of clusters of one data set; outputs are summed, where the "
        "survey averages parameters (aggregation='factored'); the temperature is ours",
        neighbours="centroid",
        keep=None,
        weights="softmax",
    ),
    _row(
        "dam",
        "two experts by centroids of hidden states, A and B averaged apart",
        "DAM: Dynamic Adapter Merging for Continual Video QA Learning, arXiv 2403.08755",
        survey=22,
        differs="keeps 2 experts at T = 0.01 as the published script does; dense is keep=None, the code's T is 1",
        embedder=HIDDEN_STATES,
        aggregation="factored",
        neighbours="centroid",
        keep=2,
        weights="softmax",
        temperature=0.01,
    ),
    _row(
        "token_level",
        "all experts by centroids, the growing text embedded at every token",
        "Token-Level Adaptation of LoRA Adapters for Downstream Task Generalization, arXiv 2311.10847",
        embedder=MINILM,
        survey=11,
        differs="weights as in the published code: the largest cosine times 4, square roots of the softmax on A and B",
        aggregation="factored",
        neighbours="centroid",
        keep=None,
        weights="sqrt",
        temperature=1.0,
        boost=4.0,
        every=1,
    ),
    _row(
        "adapter_soup",
        "a uniform mix of the experts most similar to a task",
        "AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models, arXiv 2302.07027",
        survey=3,
        differs="LoRA, where the paper has bottleneck adapters; that they are 5 is our choice",
        embedder=MPNET,
        aggregation="factored",
        neighbours="centroid",
        samples=100,
        pool="mean",
        keep=5,
        queries=100,
    ),
)
