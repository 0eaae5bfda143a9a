"""Where a module is in its model: in which stack of layers, in which layer, as which kind of linear layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """A module path taken apart at its first number; `layer` is None for a path without one.

    "model.layers.3.self_attn.q_proj" -> ("model.layers", 3, "self_attn.q_proj"); further numbers in `kind` are "*".
    """

    stack: str
    layer: int | None
    kind: str


@dataclass(frozen=True)
class Grid:
    """A stack of layers as a table. cells: {(layer, column): the modules there}; more than one where a column has "*".

    label: "encoder" or "decoder", "" for the only stack, or the path of the stack where these do not tell.
    """

    label: str
    layers: tuple[int, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[int, str], list[str]]


def place_of(module: str) -> Place:
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None:
        return Place("", None, module)
    kind = ["*" if part.isdigit() else part for part in parts[at + 1 :]]
    return Place(".".join(parts[:at]), int(parts[at]), ".".join(kind) or (parts[at - 1] if at else "module"))


def part_of(module: str) -> str:
    """ "encoder" or "decoder" for the modules of an encoder-decoder, "" for those of other models."""
    parts = module.split(".")
    return next((part for part in parts if part in ("encoder", "decoder")), "")


def stack_labels(modules: Iterable[str]) -> dict[str, str]:
    """{stack of layers: how it is called}, in the order of the modules."""
    stacks = list(dict.fromkeys(place.stack for place in map(place_of, modules) if place.layer is not None))
    parts = [part_of(stack) for stack in stacks]
    return dict(zip(stacks, parts if len(set(parts)) == len(parts) else stacks, strict=True))


def grids(modules: Sequence[str]) -> tuple[list[Grid], list[str]]:
    """(a grid for each stack of layers, the modules whose path has no layer)."""
    places = {module: place_of(module) for module in modules}
    made = []
    for stack, label in stack_labels(modules).items():
        mine = {module: place for module, place in places.items() if place.layer is not None and place.stack == stack}
        held: dict[tuple[int, str], list[str]] = {}
        for module, place in mine.items():
            held.setdefault((place.layer, place.kind), []).append(module)
        several = {kind for (_, kind), found in held.items() if len(found) > 1}
        columns = _column_names(list(dict.fromkeys(place.kind for place in mine.values())), several)
        layers = tuple(sorted({place.layer for place in mine.values()}))
        cells = {(layer, columns[kind]): found for (layer, kind), found in held.items()}
        made.append(Grid(label, layers, tuple(columns.values()), cells))
    return made, [module for module, place in places.items() if place.layer is None]


def _column_names(kinds: Sequence[str], several: set[str]) -> dict[str, str]:
    """{kind: its shortest ending that no other kind has}; those of `several` modules a layer from their "*" on."""
    names = {}
    for kind in kinds:
        parts = kind.split(".")
        least = len(parts) - max(0, _last_star(parts) - 1) if kind in several else 1
        for length in range(least, len(parts) + 1):
            name = ".".join(parts[-length:])
            if not any(other != kind and f".{other}".endswith(f".{name}") for other in kinds):
                break
        names[kind] = name
    return names


def _last_star(parts: Sequence[str]) -> int:
    return max((i for i, part in enumerate(parts) if part == "*"), default=0)
