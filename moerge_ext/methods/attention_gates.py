"""Routers that attend to the experts' outputs: the weight of an expert depends on what it would say.

    ramole           q_t = B_r A_r u_t            a LoRA of its own, "RouterLoRA", of rank `router_rank`
    adapter_fusion   q_t = K^T Q u_t              Q [O,D], K [O,O]

    w_t = softmax over e of q_t . z_te * s        z_te = B_e A_e u_t, the expert's output; s = 1/sqrt(O) and 1

    ramole           y_t = W u_t + sum_e w_te z_te          over the `keep` experts that the query's text retrieves
    adapter_fusion   y_t = W u_t + V sum_e w_te z_te        V [O,O], from the identity

q . z_e is computed as (B_e^T q) . (A_e u), so that the outputs of all experts are never held.

Where paper, survey and code differ, and what these rows do:

- `ramole`: trained over all experts, of which a share sits out every step (0.5, ours: the paper drops LoRAs at random
  too), so that it takes experts that it never saw together. The scale 1/sqrt(O) is that of attention, our reading of
  the paper's cross attention; no code of the authors was found. The retriever is an `ExampleRouter` (LoraRetriever
  embeds by an instructed encoder that was fine-tuned on some of the tasks); `keep` is 3, its top 3, and None takes all.
  Weights are of outputs, as in the paper's equation; the survey says Parameter (aggregation="factored" merges the
  factors apart).
- `adapter_fusion`: the paper's adapters are bottlenecks behind a sublayer, and its key and value are their outputs with
  the residual; here they are LoRA branches beside a linear layer. Key, query and value have no bias (the adapters
  library gives query and key one). V starts as the identity, Q and K normal with deviation 0.02, and `value_decay`
  (0.01) times |V - I|^2 is added to the loss, all three as in that library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, is_integer
from .learned import Learned, learned_plan
from .retrieval import MINILM
from .survey import SURVEY
from .weighing import Place, Weigher, draw

START = 0.02


class OutputAttention(Weigher):
    """softmax of q . z_e; a subclass says q."""

    def query(self, x: Tensor) -> Tensor:
        """x [T,D] -> q [T,O]."""
        raise NotImplementedError

    def scale(self, out: int) -> float:
        return 1.0

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        q = self.query(x)
        shrunk = torch.einsum("td,erd->ter", x, bank.lora_A.to(x.dtype))
        wanted = torch.einsum("to,eor->ter", q, bank.lora_B.to(x.dtype))
        scores = (shrunk * wanted).sum(-1)
        if bank.lora_bias is not None:
            scores = scores + q @ bank.lora_bias.to(x.dtype).T
        return scores * self.scale(q.shape[1])


class RouterLora(OutputAttention):
    """RAMoLE's."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        rank = options["router_rank"]
        return {"router_A": (rank, place.width), "router_B": (place.out, rank)}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        shape = cls.shapes(place, options)["router_A"]
        return super().start(place, options, generator) | {"router_A": draw(shape, place.width**-0.5, generator)}

    def query(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.router_A.to(x.dtype)), self.router_B.to(x.dtype))

    def scale(self, out: int) -> float:
        return 1 / math.sqrt(out)


class Fusion(OutputAttention):
    """AdapterFusion's."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        square = (place.out, place.out)
        return {"query_weight": (place.out, place.width), "key": square, "value": square}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        shapes = cls.shapes(place, options)
        made = {name: draw(shapes[name], START, generator) for name in ("query_weight", "key")}
        return made | {"value": torch.eye(place.out, dtype=torch.float32, device="cpu")}

    def query(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.query_weight.to(x.dtype)) @ self.key.to(x.dtype)

    def finish(self, branch: Tensor, x: Tensor) -> Tensor:
        return functional.linear(branch.to(self.value.dtype), self.value)

    def penalty(self) -> Tensor:
        eye = torch.eye(len(self.value), device=self.value.device, dtype=torch.float32)
        return self.options["value_decay"] * (self.value - eye).square().sum()


def retrieved(affinities: Tensor, options: Mapping[str, Any]) -> Tensor:
    """s [N,E] -> 0 for the `keep` largest of a row (ties to the lower id), -inf for the others, float32."""
    keep = affinities.shape[1] if options["keep"] is None else min(options["keep"], affinities.shape[1])
    best = affinities.float().sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return torch.full_like(affinities, -torch.inf, dtype=torch.float32).scatter(1, best, 0.0)


def check_ramole(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for numbers that `ramole` cannot use."""
    for name in ("router_rank", "keep", "neighbours", "samples"):
        value = options[name]
        optional = name in ("keep", "samples")
        if not (is_integer(value) and value >= 1) and not (optional and value is None):
            everything = " or None" if optional else ""
            raise ValueError(f"method '{method}': {name} must be a positive integer{everything}, got {value!r}")


def check_fusion(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for a `value_decay` that is no number from 0 on."""
    if not (isinstance(options["value_decay"], (int, float)) and options["value_decay"] >= 0):
        raise ValueError(f"method '{method}': value_decay must not be negative, got {options['value_decay']!r}")


RETRIEVED = Learned(
    weigher=RouterLora,
    kept=("router_rank",),
    check=check_ramole,
    training={"steps": 400, "lr": 1e-3, "dropout": 0.5},
)
RAMOLE = Method(
    name="ramole",
    summary="3 experts by the query's text, weighed by a trained LoRA that attends to their outputs",
    paper="Retrieval-Augmented Mixture of LoRA Experts for Uploadable Machine Learning, arXiv 2406.16989",
    taxonomy=SURVEY[29].taxonomy,
    plan=partial(learned_plan, method="ramole", learned=RETRIEVED),
    routing=None,
    bias=retrieved,
    options={"routers": None, "router_rank": 6, "keep": 3, "neighbours": 1, "samples": 1000},
    source="examples",
    embedder=MINILM,
    learned=RETRIEVED,
    survey=29,
    differs="outputs are mixed; retriever by examples of the experts; the scale 1/sqrt(O) is our reading",
)

FUSED = Learned(weigher=Fusion, kept=("value_decay",), check=check_fusion, training={"steps": 1000, "lr": 5e-5})
ADAPTER_FUSION = Method(
    name="adapter_fusion",
    summary="attention over all experts' outputs, then a trained value matrix",
    paper="AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247, section 4",
    taxonomy=SURVEY[1].taxonomy,
    plan=partial(learned_plan, method="adapter_fusion", learned=FUSED),
    routing=None,
    options={"routers": None, "value_decay": 0.01},
    learned=FUSED,
    survey=1,
    differs="LoRA experts beside linear layers; no bias in key and query",
)

ROWS = (RAMOLE, ADAPTER_FUSION)
