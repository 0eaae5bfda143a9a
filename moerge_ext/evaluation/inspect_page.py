"""An inspection as one HTML file with zoom: opens without a network, plotly.js is in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files.atomic import write_atomically
from .inspect import Inspection
from .layer_view import cell_shares, leader
from .palette import cut
from .places import Grid, grids

_TOLD = 6  # experts in the text of a cell
_HEAD = """<!doctype html><html><head><meta charset="utf-8"><title>moerge inspect</title>
<style>body{font-family:sans-serif;margin:1em} h2{margin-bottom:0} p{margin:.3em 0 1em;max-width:60em}</style></head>
<body><h1>Where the tokens go</h1>
<p>Mean routing distribution of each task's tokens. Drag a rectangle to zoom in, double-click to zoom out; point at a
cell for its experts.</p>
"""
_LAYERS = "layers by kinds of linear layers; the list chooses the expert whose share is shown"
_MODULES = "modules by experts (PHATGOOSE, figure 3); the best expert's column is dashed"


def check_plotly() -> None:
    """ImportError, with the install line, without plotly."""
    if find_spec("plotly") is None:
        raise ImportError('an HTML page needs plotly: pip install "moerge_ext[html]"')


def write_page(found: Sequence[Inspection], path: Path) -> int:
    """Write the page; its size in bytes. ImportError, with the install line, without plotly."""
    check_plotly()
    import plotly.io

    parts = [_HEAD]
    for method in dict.fromkeys(i.method for i in found):
        mine = [i for i in found if i.method == method]
        stacks, _ = grids(list(mine[0].modules))
        figures = [(f"{method} {grid.label}", _LAYERS, _layers(mine, grid)) for grid in stacks]
        figures.append((method, _MODULES, _modules(mine)))
        for title, said, figure in figures:
            made = plotly.io.to_html(figure, include_plotlyjs=len(parts) == 1, full_html=False)
            parts.append(f"<h2>{escape(title)}</h2><p>{said}</p>\n{made}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join([*parts, "</body></html>\n"])
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path.stat().st_size


def _panels(found: Sequence[Inspection], high: float) -> Any:
    """A figure with a panel for each task, one below another, on shared axes."""
    from plotly.subplots import make_subplots

    gap = min(0.08, 0.5 / len(found))
    titles = [escape(_title(inspection)) for inspection in found]
    figure = make_subplots(len(found), 1, shared_xaxes="all", subplot_titles=titles, vertical_spacing=gap)
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(showticklabels=True)
    figure.update_layout(height=len(found) * (high + 110) + 120, coloraxis={"colorscale": "Viridis", "cmin": 0})
    return figure


def _title(inspection: Inspection) -> str:
    best = "" if inspection.oracle is None else f", best expert {cut(inspection.oracle)}"
    return f"{cut(inspection.task, 40)}{best}"


def _layers(found: Sequence[Inspection], grid: Grid) -> Any:
    import plotly.graph_objects as go

    experts = found[0].experts
    shares = [cell_shares(inspection, grid) for inspection in found]
    figure = _panels(found, 12.0 * len(grid.layers))
    axes = {"x": [escape(column) for column in grid.columns], "y": [f"layer {layer}" for layer in grid.layers]}
    own = [_values(values[..., experts.index(leader(i))]) for values, i in zip(shares, found, strict=True)]
    for row, (values, first) in enumerate(zip(shares, own, strict=True), 1):
        text = [[_told(cell, experts) for cell in line] for line in values]
        hover = "%{y}, %{x}<br>%{text}<extra></extra>"
        figure.add_trace(go.Heatmap(z=first, text=text, hovertemplate=hover, coloraxis="coloraxis", **axes), row, 1)
    choices = [("each task's best or leading expert", own)]
    choices += [(name, [_values(values[..., e]) for values in shares]) for e, name in enumerate(experts)]
    buttons = [{"label": escape(name), "method": "restyle", "args": [{"z": z}]} for name, z in choices]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 40}}
    figure.update_layout(updatemenus=[menu], margin={"t": 120})
    return figure


def _modules(found: Sequence[Inspection]) -> Any:
    import plotly.graph_objects as go

    experts, modules = found[0].experts, list(found[0].modules)
    figure = _panels(found, min(1600.0, max(60.0, 5.0 * len(modules))))
    axes = {"x": [escape(name) for name in experts], "y": [escape(name) for name in modules]}
    hover = "%{y}<br>%{x}: %{z:.1%}<extra></extra>"
    for row, inspection in enumerate(found, 1):
        z = _values(inspection.shares_of(modules))
        figure.add_trace(go.Heatmap(z=z, hovertemplate=hover, coloraxis="coloraxis", **axes), row, 1)
        if inspection.oracle is not None:
            at = experts.index(inspection.oracle)
            edges = {"x0": at - 0.5, "x1": at + 0.5, "y0": -0.5, "y1": len(modules) - 0.5}
            figure.add_shape(type="rect", line={"color": "red", "dash": "dash"}, row=row, col=1, **edges)
    return figure


def _values(shares: Any) -> list[list[float | None]]:
    """Three digits are what a colour shows; None where there is no module."""
    return [[None if value != value else round(value, 3) for value in line] for line in shares.tolist()]


def _told(cell: Any, experts: Sequence[str]) -> str:
    if cell[0].isnan():
        return "no module"
    best = cell.topk(min(_TOLD, len(experts)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return "<br>".join(f"{escape(experts[e])} {share:.1%}" for share, e in pairs)
