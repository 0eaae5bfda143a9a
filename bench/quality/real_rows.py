"""Which rows are asked of a pool, in parts: what matters most first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.quality import real, real_variants
from bench.quality.real_routers import Deciders
from bench.quality.real_written import SUFFIX
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.runs import MULTITASK, Run, ablation, parse_run
from moerge_ext.evaluation.tasks import Task
from moerge_ext.experts.bank import ExpertBank
from moerge_ext.methods import get_method
from moerge_ext.methods.fixed import PREFIX

SCALED = ("base", "merged", "retrieval", "phatgoose")  # of pools of other sizes, beside their experts alone
CLAIMED = (  # something of, on held-out tasks
    "base", "phatgoose", "retrieval", "merged", "arrow_phatgoose", "average_activation", "merged_factors",
    "phatgoose/top_k=3",
)  # fmt: skip
FIRST = ("base", "phatgoose", "retrieval", "merged", "arrow_phatgoose", "average_activation")
SECOND = ("phatgoose/top_k=1", "phatgoose/top_k=3", "arrow", "merged_factors", "glider")
THIRD = ("knn", "centroid", "retrieval_task", "adapter_soup", "weight_sentsim", "arrow_peft", "average_activation_mttl")
OWN_INSTRUCTIONS = ("glider",)  # with the instruction of the query's task
MORE_INSTRUCTIONS = ("glider_softmax_all", "glider_code")
TEXTS = (
    "lora_retriever", "lora_retriever_fusion", "lora_retriever_selection", "benchmark_routing", "zooter", "routoo",
    "benchmark_routing_query", "routellm_mf", "routellm_classifier", "twin_merging", "weight_tfidf", "weight_uniform",
    "arrow_mttl", "dam",
)  # fmt: skip
LEARNED = ("lora_flow", "pi_tuning", "mixda", "we_moe", "pemt")
SLOW = ("weight_prior", "weight_entropy", "lorahub", "token_level", "ask_llm")  # many passes for a text
LARGE = ("adapter_fusion", "ramole", "co_llm", "pwe_moe", "mole")  # reads all experts' outputs; mole takes 18.5 GB
WRITTEN = "glider" + SUFFIX
TOLD = " (zero-shot)"  # behind the names of rows with the instruction of the query's task, as an evaluation names them
GATES = "/gates={}"  # and of those with gates of another number of steps
ABLATED = tuple(row + TOLD for row in ablation("glider", 16) if row != "glider/top_k=2")  # that one is glider itself
WHY = ("phatgoose/top_k=none", "phatgoose/scale=0.2", "phatgoose/scale=0.01")  # 1/sqrt(D) is 0.026 to 0.042
FEW_SHOT = "/few-shot"  # behind the base's name, where the prompt has solved examples


@dataclass(frozen=True)
class Part:
    """Rows that are asked together; suffix: what their names get behind them in the table."""

    runs: Sequence[Run]
    pool: ExpertBank
    routers: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""
    answerers: dict[str, Answerer] = field(default_factory=dict)
    template: str = real.TEMPLATE


def compared(pool: ExpertBank, deciders: Deciders) -> Iterator[Part]:
    """What pools of several sizes are compared by."""
    yield Part(_runs([*SCALED, *(PREFIX + name for name in pool.names)]), pool, deciders.known())


def claimed(pool: ExpertBank, tasks: Sequence[Task], deciders: Deciders) -> Iterator[Part]:
    """Of what papers say that it is better or worse than another on held-out tasks; no expert alone."""
    yield Part(_runs(CLAIMED), pool, deciders.known())
    yield Part(_runs(OWN_INSTRUCTIONS), pool, deciders.told(tasks))


def varied(pool: ExpertBank, tasks: Sequence[Task], deciders: Deciders) -> Iterator[Part]:
    """What PHATGOOSE is claimed to surpass, and itself, of the pool as it is and with every change to it."""
    for run in real_variants.RUNS:
        yield part_of(run, pool, deciders, tasks)


def parts(pool: ExpertBank, tasks: Sequence[Task], deciders: Deciders) -> Iterator[Part]:
    """The parts of a pool; what a part needs is made when it is its turn."""
    alone = [parse_run(PREFIX + name) for name in pool.names]
    yield Part(_runs(FIRST), pool, deciders.known())
    yield Part(_runs(OWN_INSTRUCTIONS), pool, deciders.told(tasks))
    yield Part(alone, pool)
    yield Part(_runs(SECOND), pool, deciders.known())
    yield part_of("meteora", pool, deciders, tasks)
    for steps in deciders.other_gates():
        yield part_of("phatgoose" + GATES.format(steps), pool, deciders, tasks)
    yield Part(_runs(THIRD), pool, deciders.known())
    yield Part(_runs(["base"]), pool, suffix=FEW_SHOT, template=real.FEW_SHOT_TEMPLATE)
    yield Part(_runs(MORE_INSTRUCTIONS), pool, deciders.told(tasks))
    together = (MULTITASK,) if deciders.places.multitask().is_dir() else ()
    for name in (*LEARNED, *TEXTS, *SLOW, *LARGE, *together, WRITTEN, *ABLATED, *WHY):
        yield part_of(name, pool, deciders, tasks)


def part_of(text: str, pool: ExpertBank, deciders: Deciders, tasks: Sequence[Task]) -> Part:
    """The part of one row, by its method's name with options; GLIDER's without TOLD is that of the query itself."""
    name = text.partition("/")[0]
    if text.endswith(TOLD):
        return Part(_runs([text.removesuffix(TOLD)]), pool, deciders.told(tasks))
    row, change = real_variants.split(text)
    if change:
        changed, routers = real_variants.pool_of(change, deciders)
        return Part(_runs([row]), changed, routers, suffix=change)
    if text == MULTITASK:
        return Part([Run(MULTITASK, PREFIX + MULTITASK)], deciders.multitask())
    if text.endswith(SUFFIX):
        written = deciders.written()
        return Part(_runs([name]), written.pool, {"instruction": written.router}, suffix=SUFFIX)
    if name in LEARNED or name in LARGE or name == "meteora":
        return _learned((text,), pool, deciders)
    if name in TEXTS:
        return Part(_runs([text]), pool, deciders.trained(name))
    return Part(_runs([text]), pool, deciders.slow(name) if name in SLOW else deciders.known())


def _runs(texts: Sequence[str]) -> list[Run]:
    return [parse_run(text) for text in texts]


def _learned(names: Sequence[str], pool: ExpertBank, deciders: Deciders) -> Part:
    runs = [parse_run(name) for name in names]
    runs = [replace(run, options={**run.options, "routers": deciders.learned(run.method)}) for run in runs]
    answerers = {run.label: deciders.decoder(run) for run in runs if get_method(run.method).decodes}
    return Part(runs, pool, deciders.known(), answerers=answerers)
