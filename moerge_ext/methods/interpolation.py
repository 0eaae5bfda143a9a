"""pi-Tuning: an expert for a target task from the experts nearest to it, with weights that are trained beside them.

    y_t = W u_t + (sum_e w_e B_e)(sum_e w_e A_e) u_t        w = softmax(a), a [E] trained for every module

A_e and B_e are trained as well; the file keeps them, the experts' folders stay. Who takes part are the target's own
expert (`target`) and the `nearest` others by the cosine of their tasks' Fisher diagonals
(`training/routers/fisher.py`), when `train_routers` is given every expert's data; else all.

Where paper, survey and code differ, and what this row does:

- The paper writes one weight per expert, the code learns them for every adapter it inserts (w = softmax(a), a = 1 at
  first) and mixes both factors apart, as here: one a per module.
- The survey's depth is Model; by the code it is Module.
- Its Fisher diagonals are of all parameters of an adapter; the order of a LoRA's rank is arbitrary, so here they are
  averaged over the rank: D numbers of A and O of B per module.
- `nearest` is ours, 2 (its code's example interpolates two or three).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from .base import Method, is_integer
from .learned import Learned, learned_plan
from .survey import SURVEY
from .weighing import Place, Weigher


class Interpolation(Weigher):
    """softmax(logits), the same for every token."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"logits": (place.experts,)}

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        return self.logits.to(x.dtype).expand(len(x), -1)


def check_pi(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for a `nearest` that is no count and a `target` that is no name."""
    if not (is_integer(options["nearest"]) and options["nearest"] >= 1):
        raise ValueError(f"method '{method}': nearest must be a positive integer, got {options['nearest']!r}")
    if not (options["target"] is None or isinstance(options["target"], str)):
        raise ValueError(f"method '{method}': target must be the name of an expert, got {options['target']!r}")


INTERPOLATED = Learned(
    weigher=Interpolation,
    kept=("without",),
    check=check_pi,
    training={"steps": 500, "lr": 1e-4},
    experts=True,
    own_data=True,
)
PI_TUNING = Method(
    name="pi_tuning",
    summary="the experts nearest to a task by Fisher diagonals, weights and experts trained on it",
    paper="pi-Tuning: Transferring Multimodal Foundation Models with Optimal Multi-task Interpolation, "
    "arXiv 2304.14381, section 3",
    taxonomy=SURVEY[4].taxonomy,
    plan=partial(learned_plan, method="pi_tuning", learned=INTERPOLATED),
    routing=None,
    aggregation="factored",
    options={"routers": None, "target": None, "nearest": 2, "without": None},
    learned=INTERPOLATED,
    survey=4,
    differs="a weight per module as in the code; Fisher diagonals averaged over the rank; `nearest` is ours",
)

ROWS = (PI_TUNING,)
