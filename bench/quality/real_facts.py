"""How the experts and the answers were made, as the results' files say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.quality.real_answers import Results, items
from bench.quality.real_names import shown_name

PAPER_SEQUENCES = 100 * 1024  # that the gates of an expert see in PHATGOOSE, section 4.1


def facts(results: Results, others: Mapping[str, Results] | None = None) -> str:
    """A list; others: what stands beside the main table {what: results}, with experts of the same recipe."""
    found = [*_made(results), *_learned(results), *_together(results), *_noted(results), *_joined(results)]
    found += _others(results, others or {})
    return "\n".join(f"- {text}" for text in found)


def _made(results: Results) -> Iterator[str]:
    recipe, experts = results.facts["recipe"], results.facts["experts"].values()
    minutes = {kind: sum(made[kind]["cpu_s"] for made in experts) / 60 for kind in ("expert", "gates")}
    yield (
        f"{len(experts)} experts, rank {recipe['rank']} on all linear layers, alpha {recipe['alpha']:g}, AdamW at "
        f"{recipe['lr']:g}, {recipe['steps']} steps of {recipe['batch_size']} rows; {minutes['expert']:.0f} CPU "
        "minutes."
    )
    seen = recipe["gate_steps"] * recipe["gate_batch_size"]
    yield (
        f"Gates {recipe['gate_steps']} steps of {recipe['gate_batch_size']} rows at {recipe['gate_lr']:g}: {seen} "
        f"sequences for an expert, where the paper has {PAPER_SEQUENCES:,}; {minutes['gates']:.0f} CPU minutes."
    )
    yield (
        f"{items(results)} random items a task. In percent, with 95 % intervals: the tasks fixed, their items a sample."
    )


def _learned(results: Results) -> Iterator[str]:
    """What the rows saw that are not made of single experts."""
    if "pooled" in (known := results.facts):
        sparse = " and ".join(known["sparse"])
        yield (
            f"Rows learned over the pool saw {known['pooled']} rows of every held-in task ({sparse}) or "
            f"{known['dense']} (the others) once, {known['recipe']['batch_size']} in a step, at their methods' own "
            f"rates; routers of texts the inputs of {known['pooled']}, or the answers of every expert to "
            f"{known['judged']} validation rows of each. Solved examples: {known['shots']}."
        )


def _together(results: Results) -> Iterator[str]:
    """How the one LoRA of all tasks was made."""
    if (made := results.facts.get("multitask")) is not None:
        yield (
            f"The one LoRA of all held-in tasks saw {made['rows']} rows of them in {made['steps']} steps of "
            f"{results.facts['recipe']['batch_size']}, as many as all experts together."
        )


def _noted(results: Results) -> Iterator[str]:
    """Where and by what, which older files do not say."""
    if (made := results.facts.get("made")) is not None:
        yield (
            f"Commit {made['commit']}, torch {made['torch']}, {made['machine']}, threads {made['threads']}, "
            f"seed {made['seed']}; for each expert {made['activations']} examples of average activation, "
            f"{made['indexed']} of retrieval, {made['calibrated']} queries for GLIDER's threshold; "
            f"embedder {made['embedder']}."
        )


def _joined(results: Results) -> Iterator[str]:
    """Which rows were asked of experts that were trained once more, and how it is known that these are the same."""
    if (again := results.facts.get("again")) is not None:
        experts, same = again["losses"]
        checks = ", ".join(f"{run} {equal} of {asked}" for run, (asked, equal) in again["answers"].items())
        yield (
            f"Asked of experts that were trained once more by the same commands: "
            f"{', '.join(shown_name(row) for row in again['rows'])}. {same} of {experts} had the same losses in every "
            f"step, and of the answers to these items the same came from {checks}."
        )


def _others(results: Results, others: Mapping[str, Results]) -> Iterator[str]:
    """Of results that stand beside these: whether their experts, and answers that both have, are the same."""
    known, said = results.facts["experts"], []
    for what, other in others.items():
        found = {name: made for name, made in other.facts["experts"].items() if name in known}
        if any(known[name] != made for name, made in found.items()):
            same = sum(known[name]["expert"]["losses"] == made["expert"]["losses"] for name, made in found.items())
            said.append(f"{what} ({same} of {len(found)} with the same losses in every step{_answers(results, other)})")
    if said:
        yield f"Also of experts that were trained once more: {', '.join(said)}."


def _answers(results: Results, other: Results) -> str:
    """Of the same pool: from which rows other answers came to the items that both were asked."""
    if len(other.facts["experts"]) != len(results.facts["experts"]):
        return ""
    counts: dict[str, list[bool]] = {}
    for (row, task), answered in other.answered.items():
        if (row, task) in results.answered:
            pairs = zip(results.answered[row, task].answers, answered.answers, strict=False)
            counts.setdefault(row, []).extend(ours == theirs for ours, theirs in pairs)
    strange = [f"{shown_name(row)} {sum(same)} of {len(same)}" for row, same in counts.items() if not all(same)]
    if not counts:
        return ""
    return f"; the same answers but for {', '.join(strange)}" if strange else "; the same answers"
