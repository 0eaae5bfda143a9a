"""The routing methods: METHODS is the table, one `Method` per row; a new method is a row in a file here."""

from __future__ import annotations

from . import arrow, average_activation, given, glider, merged, phatgoose, retrieval
from .base import Method, Plan, Routing, Taxonomy
from .fixed import PREFIX, fixed_expert

__all__ = ["METHODS", "Method", "Plan", "Routing", "Taxonomy", "get_method"]

METHODS: dict[str, Method] = {
    row.name: row
    for family in (phatgoose, arrow, average_activation, merged, glider, given, retrieval)
    for row in family.ROWS
}


def get_method(name: str) -> Method:
    """The row called `name`, or one made for `expert:<name>`; else a ValueError that lists every method."""
    if isinstance(name, str):
        if name in METHODS:
            return METHODS[name]
        if name.startswith(PREFIX) and len(name) > len(PREFIX):
            return fixed_expert(name[len(PREFIX) :])
    known = ", ".join([*METHODS, f"{PREFIX}<name>"])
    raise ValueError(f"unknown method {name!r}; expected one of {known}")
