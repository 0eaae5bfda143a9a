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


def shares(
    segments: Sequence[Segment], modules: Mapping[str, int], columns: tuple[int, int] | None = None
) -> dict[str, Share]:
    """{module: its share} of a layer made of `segments`, of `modules` {name: O} in the layer's order.

    ValueError when the segments do not add up to the modules.
    """
    found, left, offset = {}, list(segments), 0
    for name, features in modules.items():
        rows, begin, seen = [], offset, 0
        while left and seen < features:
            segment = left.pop(0)
            rows.append((seen + segment.start, segment.size))
            seen += segment.whole
            offset += segment.size
        if seen != features:
            parts = " + ".join(str(segment.whole) for segment in segments)
            raise ValueError(f"its output features are {parts}, which do not add up to {dict(modules)}")
        found[name] = Share(begin, offset - begin, tuple(rows), columns)
    if left:
        raise ValueError(f"it has {sum(s.whole for s in left)} output features more than {dict(modules)}")
    return found
