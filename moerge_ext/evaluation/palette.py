"""One colour an expert, the same in pictures, pages and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# matplotlib's tab20 without its greys: the strong ones first, so that few experts differ most
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d", "#9edae5"),
)
OTHERS = "#c8c8c8"  # all experts that have no colour of their own


def coloured(experts: Sequence[str], shares: Tensor, first: Sequence[str] = ()) -> dict[str, str]:
    """{expert: "#rrggbb"} for as many as there are colours: those of `first`, then by descending share [E]."""
    ranked = sorted(range(len(experts)), key=lambda e: -float(shares[e]))
    names = list(dict.fromkeys([*(name for name in first if name in experts), *(experts[e] for e in ranked)]))
    return dict(zip(names, COLOURS, strict=False))


def colour_of(expert: str, colours: Mapping[str, str]) -> str:
    return colours.get(expert, OTHERS)


def rgb(colour: str) -> tuple[int, int, int]:
    """ "#1f77b4" -> (31, 119, 180)."""
    return tuple(bytes.fromhex(colour[1:]))


def ink_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour (ITU-R BT.601 luma)."""
    red, green, blue = rgb(colour)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"


def cut(name: str, length: int = 28) -> str:
    """A long name without its middle."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[: length - 1 - half]}…{name[-half:]}"
