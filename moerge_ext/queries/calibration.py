"""The threshold of GLIDER for an embedder other than the paper's, and the plot that shows where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic import write_figure
from .router import QueryRouter


@dataclass(frozen=True)
class Calibration:
    """threshold; held_in and held_out: {task: s_glob of its queries, [N,E]}; names: the E experts.

    own: {held-in task with an expert of its name: share of its queries that are most similar to that expert}; a low
    share says that the instructions are bad, before the evaluation does.
    """

    threshold: float
    held_in: dict[str, Tensor]
    held_out: dict[str, Tensor]
    own: dict[str, float]
    names: tuple[str, ...]

    def above(self) -> dict[str, float]:
        """{task: share of its queries above the threshold}."""
        scores = {**self.held_in, **self.held_out}
        return {task: (s.amax(1) > self.threshold).double().mean().item() for task, s in scores.items()}

    def by_expert(self) -> dict[str, dict[str, float]]:
        """{task: {expert: its score, the mean over the task's queries}}."""
        scores = {**self.held_in, **self.held_out}
        return {task: dict(zip(self.names, s.mean(0).tolist(), strict=True)) for task, s in scores.items()}

    def plot(self, path: str | Path) -> Path:
        """Write a PNG, the paper's Figure 3: the global score of every expert for every task, against the threshold.

        A dot is an expert, its score the mean over the task's queries (the paper has one instruction per task, so one
        score); the expert of the task's name is a diamond. A thin box shows the largest score of each query, which is
        what the rule compares with the threshold.

        Errors: ImportError, with the install line, without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('the plot needs matplotlib: pip install "moerge_ext[plot]"') from error
        scores = {**self.held_in, **self.held_out}
        figure = Figure(figsize=(8, 1.2 + 0.34 * len(scores)), layout="constrained")
        axis = figure.subplots()
        colors = ["tab:blue"] * len(self.held_in) + ["tab:orange"] * len(self.held_out)
        boxes = axis.boxplot(
            [s.amax(1).tolist() for s in scores.values()],
            orientation="horizontal",
            tick_labels=list(scores),
            patch_artist=True,
            showfliers=False,
            widths=0.5,
        )
        for row, (task, color) in enumerate(zip(scores, colors, strict=True), 1):
            boxes["boxes"][row - 1].set(facecolor="none", edgecolor=color)
            mean = self.by_expert()[task]
            axis.scatter(list(mean.values()), [row] * len(mean), s=14, color=color, alpha=0.7, zorder=3)
            if task in mean:
                axis.scatter([mean[task]], [row], s=42, marker="D", color="none", edgecolor="black", zorder=4)
        axis.axvline(self.threshold, ls="--", color="red")
        axis.invert_yaxis()
        axis.set_xlabel(
            f"global score (threshold {self.threshold:.3f}, dashed); dots: experts, diamond: the task's own, box: the "
            "largest of each query",
            fontsize=8,
        )
        axis.set_title("blue: held-in tasks" + (", orange: held-out tasks" if self.held_out else ""), fontsize=10)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_figure(path, figure)
        return path


def calibrate_threshold(
    router: QueryRouter,
    held_in: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]] | None = None,
    *,
    keep: float = 0.9,
) -> Calibration:
    """The threshold that sends the share `keep` of held-in queries to their experts by the global score.

    GLIDER trusts the global affinity of a query (alpha = gamma + beta) when its largest s_glob exceeds the threshold.
    Held-in queries are of tasks that have an expert, so the threshold is put just below the (1 - keep) quantile of
    their largest scores. `held_out` tasks decide nothing; they are scored for the plot. The threshold is also set on
    `router`.

    ValueError for no queries, or keep outside (0, 1).
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep must be in (0, 1), got {keep}")
    if not held_in or not all(held_in.values()):
        empty = [task for task, texts in held_in.items() if not texts]
        raise ValueError(f"expected held-in queries of at least one task, got none for {', '.join(empty) or 'any'}")
    scores = {task: router.affinities(texts) for task, texts in held_in.items()}
    own = {
        task: (s.argmax(1) == router.names.index(task)).double().mean().item()
        for task, s in scores.items()
        if task in router.names
    }
    outside = {task: router.affinities(texts) for task, texts in (held_out or {}).items()}
    limit = torch.quantile(torch.cat([s.amax(1) for s in scores.values()]), 1 - keep, interpolation="lower")
    threshold = torch.nextafter(limit, limit - 1).item()  # the rule asks for more than the threshold
    router.threshold = threshold
    return Calibration(threshold, scores, outside, own, router.names)
