"""The differences between rows that README.md speaks of, and pools of several sizes against each other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from bench.quality.real_claims import HELD_IN, HELD_OUT, OWN, QUERY, WRITTEN
from bench.quality.real_names import shown_name
from bench.quality.real_scores import BEST, ORACLE, Scores
from bench.quality.real_verdicts import NEITHER, Verdict, verdict

COMPARED = (
    ("retrieval", "phatgoose"), ("average_activation", "phatgoose"), ("average_activation", "retrieval"),
    ("average_activation", "merged"), ("phatgoose", "merged"), ("phatgoose", "arrow_phatgoose"),
    ("arrow_phatgoose", "merged"), ("phatgoose", ORACLE), ("phatgoose/gates=10", "phatgoose"),
    ("phatgoose/gates=30", "phatgoose"), ("phatgoose/gates=100", "phatgoose"),
    ("phatgoose/gates=100", "phatgoose/gates=10"), ("phatgoose/gates=100", "average_activation"),
    ("phatgoose/gates=100", "merged"), ("phatgoose/top_k=none", "phatgoose"), ("phatgoose/scale=0.2", "phatgoose"),
    ("phatgoose/scale=0.01", "phatgoose"), ("phatgoose/scale=0.01", "average_activation"),
    ("phatgoose/top_k=1", "phatgoose"), ("phatgoose/top_k=3", "phatgoose"),
    ("lora_retriever", "lora_retriever_selection"), ("lora_retriever_fusion", "lora_retriever_selection"),
    ("retrieval_task", "retrieval"), ("lora_retriever_selection", "retrieval"), (OWN, "retrieval"),
    (QUERY, "phatgoose"), (WRITTEN, "phatgoose"), (WRITTEN, "merged"), ("meteora", "phatgoose"),
    ("ramole", "retrieval"), ("benchmark_routing_query", "retrieval"), ("routoo", "retrieval"), ("zooter", "retrieval"),
    ("benchmark_routing", "benchmark_routing_query"), ("dam", "merged"), ("weight_sentsim", "merged"),
    ("weight_tfidf", "merged"), ("weight_tfidf", "retrieval"), ("weight_entropy", "weight_uniform"),
    ("token_level", "merged"), ("lorahub", "retrieval"), ("twin_merging", "merged"), ("twin_merging", "phatgoose"),
    ("co_llm", "merged"), ("multitask", "retrieval"), ("multitask", "phatgoose"), ("base/few-shot", "base"),
    ("phatgoose", BEST),
)  # fmt: skip
IN_POOLS = (("phatgoose", "merged"), ("phatgoose", "retrieval"))
BY_SIZE = ("phatgoose", "retrieval", "merged", ORACLE)
LEGEND = "Bold: told apart. \\*: one task, left out, changes whether it is."


def cell(found: Verdict) -> str:
    """A difference; bold when told apart, starred when one task decides."""
    text = f"**{found.points}**" if found.word != NEITHER else found.points
    return text + "\\*" * bool(found.other)


def table(scores: Scores, more: Scores | None = None) -> str:
    """A line for each pair of rows; held out by more items where both were asked them."""
    lines = ["| row | minus | held in | held out |", "| --- | --- | ---: | ---: |"]
    for row, other in COMPARED:
        if {row, other} <= scores.known:
            held_out = more if more is not None and {row, other} <= more.known else scores
            cells = (
                cell(verdict(of.differences(row, other, of.results.part(part))))
                for part, of in ((HELD_IN, scores), (HELD_OUT, held_out))
                if of.results.part(part)
            )
            dagger = "†" * (held_out is more)
            lines.append(f"| {shown_name(row)} | {shown_name(other)} | {' | '.join(cells)}{dagger} |")
    asked = "" if more is None else f" †: by the {len(more.results.tasks)} tasks of *Held-out tasks, asked more*."
    return "\n".join(lines) + f"\n\n{LEGEND}{asked}"


def pools(found: Mapping[int, Scores], names: list[str]) -> str:
    """Rows against each other in every pool, then the pools against each other: each with the next, and the ends."""
    lines = [f"| minus | {' | '.join(f'{size} experts' for size in found)} |", "| --- |" + " ---: |" * len(found)]
    for row, other in IN_POOLS:
        cells = (cell(verdict(scores.differences(row, other, names))) for scores in found.values())
        lines.append(f"| {shown_name(row)} minus {shown_name(other)} | {' | '.join(cells)} |")
    sizes = [*pairwise(found), (min(found), max(found))]
    lines += ["", "| row | " + " | ".join(f"{a} minus {b} experts" for a, b in sizes) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for row in BY_SIZE:
        cells = (cell(verdict(found[a].differences(row, row, names, found[b]))) for a, b in sizes)
        lines.append(f"| {shown_name(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{LEGEND}"
