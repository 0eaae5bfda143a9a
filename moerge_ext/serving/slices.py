"""Which rows and columns of a module this rank's share of an engine's layer holds.

Engines put modules that read the same input into one layer (q, k and v; gate and up) and share its output features
(column parallel) or its input features (row parallel) out over ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..routing.shares import Share


@dataclass(frozen=True)
class Segment:
    """Output features that a layer holds as one piece: `size` of them here, the `start`-th and on of `whole`."""

    size: int
    start: int
    whole: int


def by_kind(groups: int, queries: int, width: int) -> list[tuple[int, int]]:
    """[(start, size)] of the rows of a module that has q, k and v group after group ([groups, queries + 2, width]), in
    the order of an engine that loads them as all of q, then k, then v."""
    each, kinds = (queries + 2) * width, ((0, queries), (queries, 1), (queries + 1, 1))
    return [(group * each + first * width, many * width) for first, many in kinds for group in range(groups)]


def part_of(order: Sequence[tuple[int, int]], start: int, size: int) -> list[tuple[int, int]]:
    """Of the rows in `order`, [(start, size)], the `size` that begin with the `start`-th."""
    found, at = [], 0
    for first, many in order:
        begin, end = max(start, at), min(start + size, at + many)
        if begin < end:
            found.append((first + begin - at, end - begin))
        at += many
    return found


def shares(
    segments: Sequence[Segment],
    modules: Mapping[str, int],
    columns: tuple[int, int] | None = None,
    order: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Share]:
    """{module: its share} of a layer made of `segments`, of `modules` {name: O} in the layer's order.

    order: that in which the layer holds the rows of its one module; None for the module's own.
    ValueError when the segments do not add up to the modules.
    """
    found, left, offset = {}, list(segments), 0
    for name, features in modules.items():
        rows, begin, seen = [], offset, 0
        while left and seen < features:
            segment = left.pop(0)
            mine = (seen + segment.start, segment.size)
            rows += [mine] if order is None else part_of(order, *mine)
            seen += segment.whole
            offset += segment.size
        if seen != features:
            parts = " + ".join(str(segment.whole) for segment in segments)
            raise ValueError(f"its output features are {parts}, which do not add up to {dict(modules)}")
        found[name] = Share(begin, offset - begin, tuple(rows), columns)
    if left:
        raise ValueError(f"it has {sum(s.whole for s in left)} output features more than {dict(modules)}")
    return found
