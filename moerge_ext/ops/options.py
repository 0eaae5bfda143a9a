"""The options of the ops, once: name, type, default and meaning, in the order of the schemas in csrc/ops.cpp.

Wrappers and reference take them as `**options: Unpack[...]` (PEP 692), so that editors complete them, under
`@documented`, so that `help()` shows them; gradients and fake kernels find them by their names. A new option is a line
here and one in csrc/ops.cpp. Knows torch alone.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints

from torch import Tensor


class Option(NamedTuple):
    default: Any
    meaning: str


Normalize = Literal["standardize", "unit", "none"]
Weighting = Literal["softmax", "softmax_all", "sigmoid", "score"]


class RouteOptions(TypedDict, total=False):
    """How experts are scored, kept and weighed."""

    top_k: Annotated[int, Option(2, "K, 1 <= K <= E.")]
    normalize: Annotated[
        Normalize,
        Option(
            "standardize",
            '"standardize", (u - mean) / sqrt(var + 1e-5) with the biased variance over D; "unit", '
            'u / max(|u|, 1e-12); or "none".',
        ),
    ]
    absolute: Annotated[bool, Option(False, "f is the absolute value, else the identity.")]
    scale: Annotated[float | None, Option(None, 'None means 1/sqrt(D) under "standardize" and 1 otherwise.')]
    bias: Annotated[Tensor | None, Option(None, "[N,E], added to the score of each token of a row.")]
    rows: Annotated[Tensor | None, Option(None, "[T] int32, the row of each token; None: T/N adjacent tokens per row.")]
    mask: Annotated[Tensor | None, Option(None, "[E] or [N,E] bool; an expert that is False is never selected.")]
    top_p: Annotated[
        float | None,
        Option(
            None,
            "keeps the smallest set whose softmax over all unmasked experts reaches top_p, among the top_k.",
        ),
    ]
    weighting: Annotated[
        Weighting,
        Option(
            "softmax",
            '"softmax" over the kept, "softmax_all" over all unmasked experts, "sigmoid", or "score" (itself).',
        ),
    ]


_LoraBias = Annotated[Tensor | None, Option(None, "[E,O], scaled like lora_b.")]
_Factored = Annotated[bool, Option(False, 'combine the factors before they are applied (Arrow\'s "factored" merge).')]
_Packed = Annotated[
    Tensor | None, Option(None, "the result of `pack_experts(lora_a, lora_b)`, read instead of them; inference only.")
]


class ApplyOptions(TypedDict, total=False):
    """How chosen experts are applied."""

    lora_bias: _LoraBias
    rows: Annotated[
        Tensor | None,
        Option(None, "[T] int32, the row of each token, for weights [N,K]; None: T/N adjacent tokens per row."),
    ]
    factored: _Factored
    packed: _Packed


class BranchOptions(RouteOptions, total=False):
    """Both, for the ops that route and apply."""

    lora_bias: _LoraBias
    factored: _Factored
    packed: _Packed


def _option(hint: Any) -> Option:
    return hint.__metadata__[0]


def _defaults(options: type) -> dict[str, Any]:
    return {name: _option(hint).default for name, hint in get_type_hints(options, include_extras=True).items()}


# {option: its default}, in the order of the schema
ROUTE, APPLY, BRANCH = _defaults(RouteOptions), _defaults(ApplyOptions), _defaults(BranchOptions)
# those that are tensors
TENSORS = {
    name
    for options in (BranchOptions, ApplyOptions)
    for name, hint in get_type_hints(options).items()
    if Tensor in get_args(hint)
}


def filled(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options in the order of the schema, those not given at their defaults. TypeError for an unknown one."""
    found = defaults | options
    if len(found) != len(defaults):
        unknown = ", ".join(repr(name) for name in options if name not in defaults)
        raise TypeError(f"unexpected keyword argument {unknown}; expected some of {', '.join(defaults)}")
    return found


def documented(options: type) -> Callable[[Callable], Callable]:
    """For a function with `**options`: shows them in its signature and in place of "{options}" in its docstring."""
    hints = get_type_hints(options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    shown = [
        inspect.Parameter(name, kind, default=_option(hint).default, annotation=hint.__origin__)
        for name, hint in hints.items()
    ]

    def document(function: Callable) -> Callable:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*kept, *shown])
        if function.__doc__ and "{options}" in function.__doc__:
            function.__doc__ = function.__doc__.replace("{options}", _meanings(hints))
        return function

    return document


def _meanings(hints: Mapping[str, Any]) -> str:
    fill = functools.partial(textwrap.fill, width=120, subsequent_indent=" " * 12)
    lines = (fill(f"{name}: {_option(hint).meaning}", initial_indent=" " * 8) for name, hint in hints.items())
    return "\n".join(lines).lstrip()
