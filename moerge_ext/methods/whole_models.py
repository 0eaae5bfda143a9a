"""The survey's methods whose experts are whole models, which `patch` cannot put into one: how each is made instead.

What they make is a model's folder, which every command takes as `--model`; the row of `moerge eval` is then `base`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .base import Taxonomy
from .survey import SURVEY


@dataclass(frozen=True)
class WholeModels:
    """One method. made: the commands that make and train it; the other fields are as in `Method`."""

    name: str
    summary: str
    paper: str
    survey: int
    made: str
    differs: str
    top_k: str = "-"
    weighting: str = "-"
    aggregation: str = "output"

    @property
    def taxonomy(self) -> Taxonomy:
        """The survey's nine fields."""
        return SURVEY[self.survey].taxonomy


ROWS = (
    WholeModels(
        name="branch_train_mix",
        summary="FFNs of whole models as experts of a mixture, the rest averaged, routers trained",
        paper="Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM, arXiv 2403.07816",
        survey=21,
        made="moerge mix, then moerge train-mix (docs/whole_models.md)",
        differs="routers alone are trained unless train=all; the balance loss is Switch Transformer's; steps and rates "
        "are ours",
        top_k="2",
        weighting="softmax",
    ),
    WholeModels(
        name="calm",
        summary="two frozen models; at chosen layers one attends to the other's hidden states",
        paper="LLM Augmented LLMs: Expanding Capabilities through Composition, arXiv 2401.02412",
        survey=12,
        made="moerge train-calm (docs/whole_models.md)",
        differs="attends to positions up to the token's own (the published code to all); no norm and no biases, "
        "which that has; begins as the anchor; layers at the ends of equal parts; steps and rate are ours",
        top_k="-",
        weighting="trained",
    ),
)
WHOLE_MODELS: dict[str, WholeModels] = {row.name: row for row in ROWS}
