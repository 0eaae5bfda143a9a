"""A method's own top_k where there are fewer experts: its author chose it for many."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from ..methods.base import Method


def own_top_k(method: Method, experts: Sized, options: Mapping[str, Any]) -> dict[str, int]:
    """The top_k of a method that asks by itself for more experts than there are: all of them. Empty otherwise."""
    top_k = None if method.routing is None or "top_k" in options else method.routing.top_k
    return {} if top_k is None or top_k <= len(experts) else {"top_k": len(experts)}


def own_top_k_note(method: Method, taken: Mapping[str, int]) -> str | None:
    """What is said of `own_top_k`."""
    if not taken:
        return None
    count = taken["top_k"]
    there = "there is 1 expert, which is" if count == 1 else f"there are {count} experts, all of which are"
    return f"method '{method.name}' takes the top {method.routing.top_k} by itself; {there} taken"
