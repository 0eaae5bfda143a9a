"""Layers by kinds of linear layers: in each cell the mean distribution over the experts, as a bar of their colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .canvas import Page, Size, draw_pages, length_of, panel_title, ticks
from .inspect import Inspection
from .palette import OTHERS, coloured, cut, rgb
from .places import Grid

STEPS = 60  # of a bar: a sixtieth is the least share that shows
_LEGEND = 240  # pixels


def cell_shares(inspection: Inspection, grid: Grid) -> Tensor:
    """[layers, columns, E] float64: the mean distribution of each cell's modules, NaN where the model has none."""
    made = torch.full(
        (len(grid.layers), len(grid.columns), len(inspection.experts)), torch.nan, dtype=torch.float64, device="cpu"
    )
    for (layer, column), modules in grid.cells.items():
        place = grid.layers.index(layer), grid.columns.index(column)
        made[place] = inspection.shares_of(modules).mean(0)
    return made


def colours_of(found: Sequence[Inspection]) -> dict[str, str]:
    """The colours of one method's experts: those that lead its tasks first, then by their share of everything."""
    modules = list(found[0].modules)
    total = torch.stack([inspection.shares_of(modules).mean(0) for inspection in found]).mean(0)
    return coloured(found[0].experts, total, [leader(inspection) for inspection in found])


def leader(inspection: Inspection) -> str:
    """The best expert of the task; where none is known, the one with the largest share."""
    if inspection.oracle is not None:
        return inspection.oracle
    return inspection.experts[int(inspection.shares_of(list(inspection.modules)).mean(0).argmax())]


def draw_layers(found: Sequence[Inspection], grid: Grid, path: Path, title: str) -> list[Path]:
    """Write one method's panels, a task each; the files."""
    experts, colours = found[0].experts, colours_of(found)
    wide = min(54.0, max(8.0, 800 / len(grid.columns)))
    high = min(14.0, max(3.0, 1600 / len(grid.layers)))
    below = length_of(grid.columns, 7)
    size = Size(wide * len(grid.columns), high * len(grid.layers), left=48, below=below, beside=_LEGEND)

    def panel(axis: Any, inspection: Inspection) -> None:
        picture = bars(cell_shares(inspection, grid), experts, colours, leader(inspection))
        edges = (-0.5, len(grid.columns) - 0.5, len(grid.layers) - 0.5, -0.5)
        axis.imshow(picture.numpy(), extent=edges, aspect="auto", interpolation="nearest")
        for column in range(1, len(grid.columns)):
            axis.axvline(column - 0.5, color="white", lw=3)
        for layer in range(1, len(grid.layers)):
            axis.axhline(layer - 0.5, color="white", lw=0.5)
        axis.set_title(panel_title(inspection), fontsize=8)
        ticks(axis.xaxis, grid.columns, wide, least=9, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
        ticks(axis.yaxis, [str(layer) for layer in grid.layers], high, least=9, fontsize=6)
        axis.set_ylabel("layer", fontsize=7)

    def legend(page: Page, left: float, drawn: Any) -> None:
        from matplotlib.patches import Patch

        patches = [Patch(color=colour, label=cut(name)) for name, colour in colours.items()]
        if len(colours) < len(experts):
            patches.append(Patch(color=OTHERS, label=f"{len(experts) - len(colours)} others"))
        where = {"loc": "upper left", "bbox_to_anchor": (left / page.width, 1 - 40 / page.height)}
        head = "a cell is a distribution:\neach expert as wide as its\nshare, the best one first"
        page.figure.legend(handles=patches, fontsize=7, title=head, title_fontsize=7, **where)

    return draw_pages(found, size, path, title, panel, legend)


def bars(shares: Tensor, experts: Sequence[str], colours: Mapping[str, str], first: str) -> Tensor:
    """shares [L,C,E] -> [L, C * STEPS, 3] uint8: each cell a bar, `first` at its left, then in the colours' order."""
    order = [experts.index(name) for name in (first, *(name for name in colours if name != first))]
    painted = torch.tensor(
        [rgb(colours.get(experts[e], OTHERS)) for e in order] + [rgb(OTHERS)], dtype=torch.uint8, device="cpu"
    )
    ends = shares[..., order].cumsum(-1)  # [L,C,coloured]; what is left are the others
    middles = (torch.arange(STEPS, dtype=shares.dtype, device="cpu") + 0.5) / STEPS
    which = (middles[:, None] >= ends[:, :, None] - 1e-9).sum(-1)  # [L,C,STEPS]
    picture = painted[which.clamp_max(len(order))]
    picture[shares[..., 0].isnan()] = 255
    return picture.flatten(1, 2)
