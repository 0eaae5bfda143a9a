"""The routing methods: METHODS is the table, one `Method` per row; a new method is a row in a file here.

A file is a family. `base.py` says what a row holds, `gating.py` and `prototypes.py` build gates, `learned.py` and
`weighing.py` are about routers that are trained over a bank; `whole_models.py` names what `patch` cannot do. Start with
`base.py` and `phatgoose.py`.

May import: experts, models, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from . import (
    arrow,
    attention_gates,
    average_activation,
    correlation_gates,
    deferral,
    domain_gates,
    given,
    glider,
    interpolation,
    lora_retriever,
    merged,
    phatgoose,
    retrieval,
    task_vectors,
    text_routers,
    token_gates,
    twin,
    what_weight,
)
from .base import Method, Plan, Routing, Taxonomy
from .fixed import PREFIX, fixed_expert
from .whole_models import WHOLE_MODELS

__all__ = ["METHODS", "Method", "Plan", "Routing", "Taxonomy", "get_method"]

FAMILIES = (
    *(phatgoose, arrow, average_activation, merged, glider, given, retrieval),
    *(token_gates, attention_gates, interpolation, task_vectors, domain_gates, deferral, correlation_gates),
    *(lora_retriever, text_routers, twin, what_weight),
)
METHODS: dict[str, Method] = {row.name: row for family in FAMILIES for row in family.ROWS}


def get_method(name: str, others: Sequence[str] = ()) -> Method:
    """The row called `name`, or one made for `expert:<name>`; else a ValueError that says what was meant, or lists
    every method and the `others` that the caller takes."""
    if isinstance(name, str):
        if name in METHODS:
            return METHODS[name]
        if name.startswith(PREFIX) and len(name) > len(PREFIX):
            return fixed_expert(name[len(PREFIX) :])
        if name in WHOLE_MODELS:
            raise ValueError(
                f"method '{name}' is of whole models, not of experts on one: {WHOLE_MODELS[name].made}; what it makes "
                "is a model of its own (--model)"
            )
    known = [*METHODS, f"{PREFIX}<name>", *others]
    if near := get_close_matches(str(name).lower(), known, 1):
        raise ValueError(f"unknown method {name!r}; did you mean {near[0]!r}? `moerge methods` shows all there are")
    raise ValueError(f"unknown method {name!r}; expected one of {', '.join(known)}")
