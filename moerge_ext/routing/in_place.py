"""Whether what a patch put into a model is still where it put it: layers may have been taken out or replaced since."""

from __future__ import annotations

from typing import Any

from torch import nn

from .own_module import OwnModule
from .routed_linear import RoutedLinear


def check_in_place(handle: Any, cannot: str) -> None:
    """RuntimeError, which begins with `cannot`, when a module of the handle was taken out, replaced or put twice."""
    wrapped = dict.fromkeys(handle.modules, RoutedLinear) | dict.fromkeys(handle._own_modules, OwnModule)
    owners = {path.rpartition(".")[0] for path in handle.parameters}
    there = dict(handle.model.named_modules(remove_duplicate=False))
    foreign = [n for n, kind in wrapped.items() if not isinstance(there.get(n), kind)]
    foreign += sorted(owner for owner in owners if owner not in there)
    # in another order they are all there; one that is there twice has taken another's place
    held = {there[n].name for n in handle.modules} if not foreign else ()
    if foreign := foreign or [n for n in handle.modules if n not in held]:
        got = type(there[foreign[0]]).__name__ if foreign[0] in there else "no module"
        raise RuntimeError(
            f"{cannot}: {', '.join(foreign[:5])} was replaced since (expected its own "
            f"{wrapped.get(foreign[0], nn.Module).__name__}, got {got}); undo that replacement first"
        )
