"""LoraRetriever (arXiv 2402.09997): the `keep` experts whose mean training text is most similar to the query, uniform.

    lora_retriever            mixture: their outputs are averaged       y = W u + (1/k) sum B_j A_j u
    lora_retriever_fusion     fusion: their factors are averaged        y = W u + (1/k sum B_j) (1/k sum A_j) u
    lora_retriever_selection  the best one alone

k = 3. The similarity is that of an embedder trained for it, `queries/retriever.py`: the paper's is
instructor-xl, ours any sentence-transformers model with the same instruction before the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .base import Method, Routing, is_integer
from .given import WEIGHTS, ungated_plan
from .retrieval import weigh
from .survey import SURVEY

UNIFORM = {"pool": None, "weights": "uniform"}


def weigh_uniformly(affinities: Any, options: Mapping[str, Any]) -> Any:
    """Cosines [N,E] -> 1/keep for the `keep` largest of each row."""
    return weigh(affinities, {**UNIFORM, **options})


def check(routing: Routing, options: Mapping[str, Any]) -> Routing:
    """`Method.finish`: ValueError for `keep` out of range."""
    if not (is_integer(options["keep"]) and options["keep"] >= 1):
        raise ValueError(f"lora_retriever: keep must be a positive integer, got {options['keep']!r}")
    return replace(routing, top_k=1) if options["keep"] == 1 and routing.top_k is None else routing


def _row(name: str, summary: str, keep: int, aggregation: str = "output") -> Method:
    return Method(
        name=name,
        summary=summary,
        paper="LoraRetriever: Input-Aware LoRA Retrieval and Composition for Mixed Tasks in the Wild, arXiv 2402.09997",
        taxonomy=SURVEY[17].taxonomy,
        plan=ungated_plan,
        routing=WEIGHTS,
        aggregation=aggregation,
        bias=weigh_uniformly,
        options={"keep": keep},
        finish=check,
        source="retriever",
        survey=17,
        differs="any sentence-transformers model is trained, the paper's is instructor-xl",
    )


ROWS = (
    _row("lora_retriever", "three experts by a trained retriever, outputs averaged", 3),
    _row("lora_retriever_fusion", "three experts by a trained retriever, A and B averaged apart", 3, "factored"),
    _row("lora_retriever_selection", "the best expert by a trained retriever", 1),
)
