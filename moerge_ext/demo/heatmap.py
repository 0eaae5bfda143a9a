"""The routing heatmap: how much each expert weighs in every module, one panel per skill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def shares(load: Mapping[str, Tensor]) -> Tensor:
    """{module: summed weights [E]} -> [modules, E], each row summing to 1 (0 where nothing was routed)."""
    rows = torch.stack([weights.float().cpu() for weights in load.values()])
    return rows / rows.sum(1, keepdim=True).clamp_min(1e-12)


def draw(path: Path, panels: Mapping[str, Tensor], modules: Sequence[str], experts: Sequence[str], title: str) -> Path:
    """Write a PNG: panels {skill: [modules, experts] in 0..1}; the skill's own expert (oracle) is dashed.

    Errors: ImportError, with the install line, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ImportError('the heatmap needs matplotlib: pip install "moerge_ext[plot]"') from error
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns + 1.8, 4.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for axis, (skill, values) in zip(axes.flat, panels.items(), strict=False):
        image = axis.imshow(values.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(f"{skill}  ({values[:, experts.index(skill)].mean():.0%} to its expert)", fontsize=10)
        axis.set_xticks(range(len(experts)), experts, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(modules)), [short_name(m) for m in modules], fontsize=6)
        box = Rectangle((experts.index(skill) - 0.5, -0.5), 1, len(modules), fill=False, ls="--", lw=1.6, ec="red")
        axis.add_patch(box)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the routing weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def short_name(module: str) -> str:
    """'model.layers.2.self_attn.q_proj' -> '2 q_proj'."""
    parts = module.split(".")
    number = next((p for p in parts if p.isdigit()), "")
    return f"{number} {parts[-1]}".strip()
