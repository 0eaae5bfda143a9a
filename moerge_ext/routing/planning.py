"""What a method makes of a bank of experts on a model: its options, a `Plan` for every layer, the problems."""

from __future__ import annotations

import re
from typing import Any

from ..experts.bank import ExpertBank
from ..files.listing import listed
from ..methods import get_method
from ..methods.base import Method, Plan, Routing
from .absent import ABSENT, with_absent
from .few_experts import own_top_k
from .fitting import MISSING
from .routed_branches import left_out
from .routed_linear import BACKENDS

_SHOWN = 20  # problems listed in full before the rest is only counted


def configured(
    experts: ExpertBank, method: str, backend: str, absent: str, missing: str, options: dict[str, Any]
) -> tuple[Method, tuple[Routing | None, str, dict[str, Any]]]:
    """(the row, what it makes of the options)."""
    if not isinstance(experts, ExpertBank):
        raise ValueError(f"experts must be an ExpertBank, from load_experts(...), got {type(experts).__name__}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'native' or 'reference', got {backend!r}")
    if absent not in ABSENT:
        raise ValueError(f"absent must be 'mask' or 'base', got {absent!r}")
    if missing not in MISSING:
        raise ValueError(f"missing must be 'error' or 'drop', got {missing!r}")
    row = get_method(method)
    return row, row.configure(**options | own_top_k(row, experts, options))


def plans_of(
    row: Method, experts: ExpertBank, settings: dict[str, Any], absent: str, problems: list[str]
) -> dict[str, Plan]:
    """What each layer will hold; adds to `problems` why one cannot be had."""
    plans = {}
    if row.lora_only and any(bank.branches for bank in experts.modules.values()):
        return plans
    for name, bank in experts.modules.items():
        try:
            plan = row.plan(experts, bank, name, settings)
        except ValueError as error:
            problems.append(str(error))
        else:
            plans[name] = plan if absent == "mask" else with_absent(plan, bank)
            routed = plan.gates is not None or plan.weigher is not None
            if routed and bank.branches.keys() != plan.branches.keys():
                problems.append(left_out(row, name, bank))
    return plans


def listing(what: str, problems: list[str], made_for: str | None = None) -> str:
    """`what`, of experts `made_for` another model, and the problems below it; those that many modules share are one
    line.
    """
    modules: dict[str, list[str]] = {}
    for problem in problems:
        name, said = re.fullmatch(r"(module '[^']*')?(.*)", problem, re.DOTALL).groups()
        modules.setdefault(said, []).extend([name] if name else [])
    lines = [listed(names, "module") + said for said, names in modules.items()]
    shown = lines[:_SHOWN]
    if len(lines) > _SHOWN:
        shown.append(f"... and {len(lines) - _SHOWN} more")
    head = what + (f": {made_for}" if made_for else "")
    return f"{head}:\n" + "\n".join(f"  - {p}" for p in shown)
