"""What experts are for, in a sentence each, as `moerge describe` wrote it beside them."""

from __future__ import annotations

from .bank import ExpertBank
from .kinds import INSTRUCTION


def instructions_of(experts: ExpertBank) -> dict[str, str]:
    """{expert: its instruction}, in the bank's order; ValueError that names every expert without one."""
    facts = experts.global_metadata.get(INSTRUCTION, {})
    found = {name: facts.get(name, {}).get("instruction", "") for name in experts.names}
    if missing := [name for name, text in found.items() if not text]:
        raise ValueError(f"no instruction for {', '.join(missing)}: write it with `moerge describe --adapter DIR ...`")
    return found
