"""Whether one row is above another, and on which single task that rests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.quality.real_scores import Differences, Interval, Scores

ABOVE, BELOW, NEITHER = "above", "below", "not told apart"
NOISE = 1e-9  # points that sums of floats may be off
CLOSE = 5.0  # points below that still count as coming close, on the tasks that tell rows apart


def told(interval: Interval, margin: float | None = None) -> str:
    """By the whole interval: on which side of zero it lies, or with a margin of points, of that."""
    _, low, high = interval
    line = 0.0 if margin is None else -margin
    return ABOVE if low > line + NOISE else BELOW if high < line - NOISE else NEITHER


def margin(scores: Scores, names: Sequence[str]) -> float:
    """CLOSE as points of the mean over `names`, of which tasks that tell no row from chance are no part."""
    return CLOSE * len(scores.telling(names)) / len(names)


@dataclass(frozen=True)
class Verdict:
    """interval of all tasks; other: {task: interval without it}, of those whose absence changes what is told."""

    interval: Interval
    word: str
    other: dict[str, tuple[str, Interval]]

    @property
    def points(self) -> str:
        return shown(self.interval)

    @property
    def rests_on(self) -> str:
        """The tasks that decide, what matters most first, and what is left without it."""
        if not self.other:
            return "no single task"
        first, *more = sorted(self.other, key=lambda name: -abs(self.other[name][1][0] - self.interval[0]))
        word, interval = self.other[first]
        said = f"`{first}`: without it {word}, {shown(interval)}"
        return said + (f"; likewise {', '.join(f'`{name}`' for name in more)}" if more else "")


def shown(interval: Interval) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*interval)


def verdict(found: Differences, close: Scores | None = None) -> Verdict:
    """close: whose tasks say how much is close, where that is asked and not whether a row is above."""

    def said(of: Differences) -> str:
        return told(of.interval, None if close is None else margin(close, of.names))

    word = said(found)
    parts = {name: found.without(name) for name in found.names} if len(found.names) > 1 else {}
    other = {name: (said(part), part.interval) for name, part in parts.items() if said(part) != word}
    return Verdict(found.interval, word, other)
