"""Rows that are asked later, of experts that were trained once more by the same commands, beside those there are.

They join when the experts are the same: rows of before, asked again, must get the answers of before. What was found is
kept in the facts, as "again": {"rows" that joined, "answers": {row asked again: [items, same]}, "losses": [experts,
those whose training had the same losses]}.
"""

from __future__ import annotations

import json
from typing import Any

from bench.quality.real_answers import Results

CHECKED = ("base", "merged", "retrieval")  # no expert, all of them, the one that is nearest to a question
MORE = ("written", "multitask", "nearness", "weights_told")  # facts of rows that not every table has
SAME = 0.99  # of a row's answers, at least


def joined(old: Results, new: Results) -> Results:
    """`old` with the rows of `new` that it has not; one ValueError for all that keeps them out of one table."""
    known = old.facts.get("again", {"rows": [], "answers": {}})
    more = [run for run in new.runs if run not in old.runs]
    again = [run for run in new.runs if run not in (*more, *known["rows"])]
    answers = known["answers"] | {run: _compared(run, old, new) for run in again}
    problems = _other_questions(old, new)
    problems += [f"{run} has not been asked again" for run in CHECKED if run not in answers]
    problems += [
        f"{run}: {same} of {items} answers are those of before, expected {SAME:.0%}"
        for run, (items, same) in answers.items()
        if same < SAME * items
    ]
    if problems:
        raise ValueError("rows cannot join the table:\n- " + "\n- ".join(problems))
    facts = old.facts | {key: new.facts[key] for key in MORE if key in new.facts}
    facts |= {"again": {"rows": known["rows"] + more, "answers": answers, "losses": _losses(old, new)}}
    return Results(facts, old.tasks, old.answered | {key: a for key, a in new.answered.items() if key[0] in more})


def _compared(run: str, old: Results, new: Results) -> list[int]:
    """[items, those with the same answer]."""
    pairs = [
        pair
        for name in old.tasks
        if (run, name) in new.answered
        for pair in zip(old.answered[run, name].answers, new.answered[run, name].answers, strict=True)
    ]
    return [len(pairs), sum(a == b for a, b in pairs)]


def _other_questions(old: Results, new: Results) -> list[str]:
    tasks = [name for name in {**old.tasks, **new.tasks} if old.tasks.get(name) != new.tasks.get(name)]
    known, facts = plain_facts(old.facts), plain_facts(new.facts)
    other = [key for key in {**known, **facts} if known.get(key) != facts.get(key)]
    return [f"other items or metric of {', '.join(tasks)}"] * bool(tasks) + [
        f"{key}: {facts.get(key)!r}, it was {known.get(key)!r}" for key in other
    ]


def plain_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What says how experts, routers and questions were made, as JSON gives it back; not where."""
    kept = {key: value for key, value in facts.items() if key not in ("experts", "weights", "again", "made", *MORE)}
    return json.loads(json.dumps(kept))


def _losses(old: Results, new: Results) -> list[int]:
    """[experts, those whose losses were the same in every step]."""
    known, found = old.facts["experts"], new.facts["experts"]
    same = [known[name]["expert"]["losses"] == found.get(name, {}).get("expert", {}).get("losses") for name in known]
    return [len(same), sum(same)]
