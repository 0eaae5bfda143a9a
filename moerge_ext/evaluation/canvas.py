"""What the pictures of routing share: panels on pages of bounded size, and names drawn as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ..files.atomic import write_figure
from .palette import cut

LARGEST = 2400  # pixels, each way
DPI = 110
_ACROSS = 4  # panels
_TITLE = 40  # pixels, as all below
_PANEL_TITLE = 40
_GAP = 12
_LEAST = 480, 240


class Size(NamedTuple):
    """Pixels: of a panel's picture, of the labels left of it and below, and of what stands right of all panels."""

    width: float
    height: float
    left: float
    below: float
    beside: float


class Page:
    """A figure and where things stand in it, in pixels from its upper left."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI))

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        below = self.height - top - height
        return self.figure.add_axes((left / self.width, below / self.height, width / self.width, height / self.height))


def check_matplotlib() -> None:
    """ImportError, with the install line, without matplotlib."""
    if find_spec("matplotlib") is None:
        raise ImportError('pictures need matplotlib: pip install "moerge_ext[plot]"')


def draw_pages(
    items: Sequence[Any],
    size: Size,
    path: Path,
    title: str,
    draw: Callable[[Any, Any], Any],
    finish: Callable[[Page, float, Any], None],
) -> list[Path]:
    """Write a panel for each item, on as many PNGs as it takes: `path`, then "-2", "-3" before its ending.

    draw(axis, item) fills a panel; finish(page, where the space right of the panels begins, what the last `draw`
    returned) adds the legend. ImportError, with the install line, without matplotlib.
    """
    check_matplotlib()
    wide, high = size.left + size.width + _GAP, _PANEL_TITLE + size.height + size.below
    across = max(1, min(_ACROSS, len(items), int((LARGEST - size.beside) // wide)))
    down = max(1, int((LARGEST - _TITLE) // high))
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, start in enumerate(range(0, len(items), across * down), 1):
        some = items[start : start + across * down]
        lines, least = -(-len(some) // across), _LEAST
        with _plain_text():
            page = Page(
                min(LARGEST, max(across * wide + size.beside, least[0])),
                min(LARGEST, max(lines * high + _TITLE, least[1])),
            )
            for place, item in enumerate(some):
                left, top = place % across * wide + size.left, place // across * high + _TITLE + _PANEL_TITLE
                drawn = draw(page.axes(left, top, size.width, size.height), item)
            named = title if len(items) <= across * down else f"{title} ({number})"
            page.figure.text(8 / page.width, 1 - 8 / page.height, named, fontsize=10, va="top")
            finish(page, across * wide, drawn)
            paths.append(path if number == 1 else path.with_stem(f"{path.stem}-{number}"))
            write_figure(paths[-1], page.figure, DPI)
    return paths


@contextmanager
def _plain_text() -> Iterator[None]:
    """A "$" in a name is no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def ticks(axis: Any, names: Sequence[str], pixels: float, *, least: float, **style: Any) -> None:
    """Name the places 0, 1, ... of an axis (`axis.xaxis` or `.yaxis`), or as many as `least` pixels each allow."""
    step = max(1, int(-(-least // pixels)))
    axis.set_ticks(range(0, len(names), step), [cut(name) for name in names[::step]], **style)


def length_of(names: Sequence[str], points: float) -> float:
    """Pixels that the longest of some names takes, about."""
    return max(len(cut(name)) for name in names) * points * 0.6 * DPI / 72 + 12


def panel_title(inspection: Any) -> str:
    """The task, and how much of the applied weight its best expert gets."""
    if inspection.oracle is None:
        return cut(inspection.task, 40)
    return f"{cut(inspection.task, 40)}\n{cut(inspection.oracle)} (best) gets {inspection.to_oracle:.0%}"
