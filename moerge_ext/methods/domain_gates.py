"""MixDA: domain experts, each let in by a sigmoid, and a new expert for the task beside them.

    w_te = sigmoid(F2 relu(F1 u_t + b1) + b2)_e
    y_t  = W u_t + sum_e w_te B_e A_e u_t + B' A' u_t          A' [r,D], B' [O,r]: the task's, trained with the gates

Where paper, survey and code differ, and what this row does:

- The paper's experts are adapters beside a feed-forward layer, trained by masked language modelling and an error that
  holds them near its output (its first stage, which is not here); these are LoRA experts, however they were trained.
- The survey has MLP-sigmoid gates behind the experts and a task adapter that reads their sum: here the gate reads what
  the module reads, and the task's LoRA is added (a LoRA beside a linear layer has nothing behind it to read). The
  code's present version has attention over the layer's and the adapter's output instead of sigmoids.
- The survey's granularity is Example; here every token has its own weights.
- `hidden` (D / 16 of the module, at least 1) and `task_rank` (16) are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, is_integer
from .learned import Learned, learned_plan
from .survey import SURVEY
from .weighing import Place, TaskLora, draw

START = 0.02


class DomainGate(TaskLora):
    """sigmoid of a network of the input; and the task's LoRA."""

    softmaxed = False

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        hidden = max(1, place.width // 16) if options["hidden"] is None else options["hidden"]
        gate = {"fc1": (hidden, place.width), "bias1": (hidden,), "fc2": (place.experts, hidden)}
        return gate | {"bias2": (place.experts,)} | super().shapes(place, options)

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        shapes = cls.shapes(place, options)
        made = {name: draw(shapes[name], START, generator) for name in ("fc1", "fc2")}
        return super().start(place, options, generator) | made

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        inner = functional.linear(x, self.fc1.to(x.dtype), self.bias1.to(x.dtype)).relu()
        return functional.linear(inner, self.fc2.to(x.dtype), self.bias2.to(x.dtype))

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        weights = scores.sigmoid()
        return weights if mask is None else weights.masked_fill(~mask, 0.0)


def check_mixda(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for sizes that are none."""
    for name in ("hidden", "task_rank"):
        value = options[name]
        if not (is_integer(value) and value >= 1) and not (name == "hidden" and value is None):
            raise ValueError(f"method '{method}': {name} must be a positive integer, got {value!r}")


GATED = Learned(
    weigher=DomainGate,
    kept=("hidden", "task_rank"),
    check=check_mixda,
    training={"steps": 500, "lr": 1e-3},
)
MIXDA = Method(
    name="mixda",
    summary="experts let in by sigmoids of a small network, and a new expert for the task beside them",
    paper="Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to Pre-trained Language Models' "
    "Memories, arXiv 2306.05406, section 3",
    taxonomy=SURVEY[5].taxonomy,
    plan=partial(learned_plan, method="mixda", learned=GATED),
    routing=None,
    options={"routers": None, "hidden": None, "task_rank": 16},
    learned=GATED,
    survey=5,
    differs="LoRA experts without its first stage; every token has its own weights; the task's LoRA is added",
)

ROWS = (MIXDA,)
