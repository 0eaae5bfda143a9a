"""Pictures of where tokens went: layers by kinds of linear layers, or the paper's modules by experts.

PHATGOOSE (arXiv 2402.05859), figure 3: each row is a module's mean distribution over the experts, and the column of the
best expert (oracle) is dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files.listing import listed
from .canvas import LARGEST, Page, Size, draw_pages, length_of, panel_title, ticks
from .inspect import Inspection
from .layer_view import draw_layers
from .places import Grid, grids, place_of
from .store import file_stem

VIEWS = ("layers", "modules", "both")


def draw(found: Sequence[Inspection], folder: Path, view: str = "layers") -> tuple[list[Path], list[str]]:
    """Write PNGs of at most 2400 x 2400 pixels, a panel for each task; returns (their paths, what is to be said).

    view: "layers" (`routing-<method>[-<stack>].png`; modules whose path has no layer are drawn as by "modules", in
    `routing-<method>-others.png`), "modules" (`modules-<method>[-<stack>].png`) or "both". More tasks than fit go on in
    "-2", "-3". Errors: ImportError, with the install line, without matplotlib.
    """
    if view not in VIEWS:
        raise ValueError(f"view must be one of {', '.join(VIEWS)}, got {view!r}")
    paths, notes = [], []
    for method in dict.fromkeys(i.method for i in found):
        mine = [i for i in found if i.method == method]
        stacks, others = grids(list(mine[0].modules))
        stem, title = file_stem(method), f"{method}: mean routing distribution of a task's tokens"
        for grid in stacks:
            name, said = _named(grid.label)
            if view != "modules":
                paths += draw_layers(mine, grid, folder / f"routing-{stem}{name}.png", title + said)
            if view != "layers":
                paths += _modules(mine, _of_grid(grid), folder / f"modules-{stem}{name}.png", title + said)
        if others:
            kinds = {"layers": ["routing"], "modules": ["modules"], "both": ["modules"]}[view]
            name, said = _named("others") if stacks else ("", "")
            for kind in kinds:
                paths += _modules(mine, others, folder / f"{kind}-{stem}{name}.png", title + said)
            if view != "modules":
                which = listed(others) if stacks else "the modules"
                notes.append(f"{method}: no layer is in the path of {which}: drawn one by one, modules by experts")
    return paths, notes


def _named(label: str) -> tuple[str, str]:
    return (f"-{file_stem(label)}", f", {label}") if label else ("", "")


def _of_grid(grid: Grid) -> list[str]:
    return [module for found in grid.cells.values() for module in found]


def _modules(found: Sequence[Inspection], modules: Sequence[str], path: Path, title: str) -> list[Path]:
    """A panel for each task: modules by experts."""
    experts = found[0].experts
    names = [_short(name) for name in modules]
    wide = min(max(20.0, 180 / len(experts)), max(3.0, 1000 / len(experts)))
    high = min(14.0, max(1.0, 2000 / len(names)))
    below = min(length_of(experts, 6), LARGEST - 100 - high * len(names))
    size = Size(wide * len(experts), high * len(names), left=length_of(names, 5), below=below, beside=90)
    most = max(inspection.shares_of(modules).max().item() for inspection in found)

    def panel(axis: Any, inspection: Inspection) -> Any:
        from matplotlib.patches import Rectangle

        values = inspection.shares_of(modules)
        image = axis.imshow(values.numpy(), vmin=0, vmax=most, cmap="viridis", aspect="auto")
        axis.set_title(panel_title(inspection), fontsize=8)
        ticks(axis.xaxis, experts, wide, least=9, rotation=90, fontsize=6)
        ticks(axis.yaxis, names, high, least=8, fontsize=5)
        if inspection.oracle is not None:
            left = experts.index(inspection.oracle) - 0.5
            axis.add_patch(Rectangle((left, -0.5), 1, len(names), fill=False, ls="--", lw=1.5, ec="red"))
        return image

    def legend(page: Page, left: float, image: Any) -> None:
        bar = page.axes(left + 10, 80, 15, min(400, page.height - 120))
        page.figure.colorbar(image, cax=bar, label="probability")

    return draw_pages(found, size, path, title, panel, legend)


def _short(module: str) -> str:
    """ "model.layers.2.self_attn.q_proj" -> "2 q_proj"."""
    layer, last = place_of(module).layer, module.rpartition(".")[2]
    return last if layer is None else f"{layer} {last}"
