"""Routing heatmaps: one figure per method (and per encoder and decoder), one panel per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .inspect import Inspection, part_of
from .store import file_stem


def draw(found: Sequence[Inspection], folder: Path) -> list[Path]:
    """Write `routing-<method>[-encoder|-decoder].png`: modules by experts, the oracle's column dashed.

    Errors: ImportError, with the install line, without matplotlib.
    """
    paths = []
    for method in dict.fromkeys(i.method for i in found):
        mine = [i for i in found if i.method == method]
        for part in dict.fromkeys(part_of(name) for name in mine[0].modules):
            stem = file_stem(method) + (f"-{part}" if part else "")
            title = f"{method}{', ' if part else ''}{part}: mean routing distribution of a task's tokens"
            paths.append(_figure(mine, part, folder / f"routing-{stem}.png", title))
    return paths


def _figure(found: Sequence[Inspection], part: str, path: Path, title: str) -> Path:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('heatmaps need matplotlib: pip install "moerge_ext[plot]"') from error
    experts = found[0].experts
    names, _ = found[0].shares(part)
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    size = (2 + columns * (1.2 + 0.22 * len(experts)), lines * (1.6 + 0.13 * len(names)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for axis, inspection in zip(axes.flat, found, strict=False):
        _, values = inspection.shares(part)
        image = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(inspection.task, fontsize=9)
        axis.set_xticks(range(len(experts)), experts, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=5)
        if inspection.oracle is not None:
            left = experts.index(inspection.oracle) - 0.5
            axis.add_patch(Rectangle((left, -0.5), 1, len(names), fill=False, ls="--", lw=1.5, ec="red"))
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.6, label="probability")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _short(module: str) -> str:
    """ "model.layers.2.self_attn.q_proj" -> "2 q_proj"."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdigit()), "")
    return f"{number} {parts[-1]}".strip()
