"""What the Weight? (arXiv 2401.12756): five ways to weigh experts by a text; here their parameters are averaged.

    weight_uniform   1 / E, whatever the text is
    weight_sentsim   mean cosine to 100 examples of the expert's data, by sentence embeddings
    weight_tfidf     the same by TF-IDF
    weight_prior     P(expert | text), from the likelihood of the text under each expert
    weight_entropy   1 / mean entropy of the expert's next-token distributions on the text

    y = W u + (sum_e w_e B_e)(sum_e w_e A_e) u,     the `keep` best of them, divided by their sum

The paper's other way, `ensemble`, mixes the next-token probabilities of the experts with the same weights: see
`ensemble/weighed.py`. The paper decides for a whole evaluation corpus, the survey has an example, as here. The form of
the entropy's weights is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .base import Method, Routing, is_integer
from .given import WEIGHTS, as_given, ungated_plan
from .merged import merged_factors_plan
from .retrieval import DEFAULTS, check, weigh
from .survey import SURVEY

PAPER = "What the Weight?! A Unified Framework for Zero-Shot Knowledge Composition, arXiv 2401.12756"
DIFFERS = "LoRA, where the paper has bottleneck adapters; decides for a query, the paper for a corpus"


def check_keep(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """`Method.finish`: ValueError for `keep` or `score` out of range."""
    keep, problems = options["keep"], []
    if keep is not None and not (is_integer(keep) and keep >= 1):
        problems.append(f"keep must be a positive integer or None (all experts), got {keep!r}")
    if options.get("score", "prior") not in ("prior", "entropy"):
        problems.append(f"score must be 'prior' or 'entropy', got {options['score']!r}")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))
    # a text of which TF-IDF knows no word weighs all experts alike, whatever `keep` is
    one = keep == 1 and method != "weight_tfidf"
    return replace(routing, top_k=1) if one and routing.top_k is None else routing


def _row(name: str, summary: str, source: str, differs: str = DIFFERS, **options: Any) -> Method:
    similar = source == "examples"
    return Method(
        name=name,
        summary=summary,
        paper=PAPER,
        taxonomy=SURVEY[13].taxonomy,
        plan=ungated_plan,
        routing=WEIGHTS,
        aggregation="factored",
        bias=weigh if similar else as_given,
        options=options,
        finish=partial(check if similar else check_keep, method=name),
        source=source,
        survey=13,
        differs=differs,
    )


SIMILAR = DEFAULTS | {"neighbours": "all", "samples": 100, "keep": None, "weights": "plain"}

ROWS = (
    Method(
        name="weight_uniform",
        summary="A and B of all experts averaged apart, the same for every text",
        paper=PAPER,
        taxonomy=SURVEY[13].taxonomy,
        plan=merged_factors_plan,
        routing=None,
        survey=13,
        differs="all experts, the paper's top-k draws some; LoRA, where the paper has bottleneck adapters",
    ),
    _row("weight_sentsim", "A and B averaged apart, weighed by sentence similarity", "examples", **SIMILAR),
    _row("weight_tfidf", "A and B averaged apart, weighed by TF-IDF similarity", "tfidf", keep=None),
    _row("weight_prior", "A and B averaged apart, weighed by P(expert | text)", "likelihood", keep=None, score="prior"),
    _row(
        "weight_entropy",
        "A and B averaged apart, weighed by how sure each expert is of the text",
        "likelihood",
        f"{DIFFERS}; weights are 1 / entropy",
        keep=None,
        score="entropy",
    ),
)
