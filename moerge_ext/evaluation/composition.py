"""Which experts a task is made of, with an example of each (GLIDER, arXiv 2410.07172, appendix B)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..experts.bank import ExpertBank
from ..experts.kinds import INSTRUCTION
from .inspect import Inspection
from .tasks import Task

SHOWN = 2  # experts of a task, as many as GLIDER and PHATGOOSE select; the paper shows two of COPA
MAX_TEXT = 400  # characters of an example


def top_experts(found: Inspection, count: int = SHOWN) -> list[tuple[str, float]]:
    """[(expert, its share of the applied weight over all modules)], the largest first."""
    total = sum(module.weight.abs() for module in found.modules.values())
    shares = (total / total.sum().clamp_min(1e-30)).tolist()
    return sorted(zip(found.experts, shares, strict=True), key=lambda pair: -pair[1])[:count]


def report(found: Sequence[Inspection], tasks: Sequence[Task], experts: ExpertBank, count: int = SHOWN) -> str:
    """Markdown: for every task and method its `count` experts, an example of the task and one of each expert's own.

    An expert's example is of the task of its name, if it is among `tasks`; what else is known is its instruction.
    """
    rows = {task.name: task.rows for task in tasks}
    facts = experts.global_metadata.get(INSTRUCTION, {})
    lines = ["# What tasks are made of", ""]
    for task in dict.fromkeys(i.task for i in found):
        lines += [f"## {task}", "", *_example(rows[task][0]), ""]
        for inspection in (i for i in found if i.task == task):
            named = {name: share for name, share in top_experts(inspection, count) if share > 0}
            said = ", ".join(f"{name} {share:.1%}" for name, share in named.items())
            oracle = f" (the best expert: {inspection.oracle})" if inspection.oracle else ""
            lines += [f"- {inspection.method}: {said or 'no expert'}{oracle}"]
        shown = dict.fromkeys(n for i in found if i.task == task for n, share in top_experts(i, count) if share > 0)
        for name in (name for name in shown if name != task):
            instruction = facts.get(name, {}).get("instruction")
            lines += ["", f"### expert {name}" + (f": {instruction}" if instruction else "")]
            lines += ["", *_example(rows[name][0])] if name in rows else []
        lines.append("")
    return "\n".join(lines)


def _example(row: Mapping[str, str]) -> list[str]:
    """One row, its line ends as spaces, cut to `MAX_TEXT` characters."""
    text = {part: " ".join(row[part].split()) for part in ("input", "target")}
    short = {part: said if len(said) <= MAX_TEXT else said[:MAX_TEXT] + " ..." for part, said in text.items()}
    return [f"> Question: {short['input']}", ">", f"> Answer: {short['target']}"]
