"""Gates over a frozen bank that are trained on a task and weigh the experts for every token.

    lora_flow   w_t = softmax(G h_t) + b                  h: the input of the layer, shared by all its modules
    mole        w_t = softmax(G e_t / T)                  e: the experts' outputs side by side, normalized
    meteora     w_t = softmax over the 2 largest of G u_t u: the module's own input

and y_t = W u_t + sum_e w_te B_e A_e u_t. The experts and the base are frozen; G, b and T are learned by the model's
loss.

Where paper, survey and code differ, and what these rows do:

- `lora_flow`: the paper's section 3 as written, and its code: the gate reads the layer's input before any norm. The
  code is for two LoRAs and begins with b = (-0.5, 0.5), so that one of them counts alone at first; here b begins at 0.
- `mole`: the paper flattens the outputs of all tokens of a sequence of fixed length into one vector and has one gate
  value per block and sequence; the survey says Step, and here it is per token, because lengths vary. By what the
  outputs are normalized the paper does not say; here it is a LayerNorm without affine part (eps 1e-5) over all of them.
  reads="input" takes the input u_t instead, which costs no [T,E*O]; per="layer" has one gate per layer, on its input
  (the paper's "layer-wise"). T is learned as its logarithm. `without` leaves experts out, whose weight the rest share
  (the paper's second mode). The authors' repository had no code when it was looked up.
- `meteora`: its code takes a softmax over the k largest scores, the paper's over all and renormalizes: the same. The
  gate has no bias. The code's first values are torch's of a linear layer, here normal with deviation 0.02, and its
  dropout of 0.1 before A in training is left out. top_k is 2, as in the code; at top_k = 1 the weight is always 1 and
  the gate has no gradient, which training refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import GATE_EPS, Method, Routing
from .learned import Learned, layer_of, learned_plan
from .survey import SURVEY
from .weighing import Place, Weigher, draw, masked_softmax

START = 0.02  # deviation of the gates' first values


class FlowGate(Weigher):
    """softmax(gate h) + bias."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"gate": (place.experts, place.width), "bias": (place.experts,)}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        return super().start(place, options, generator) | {"gate": draw((place.experts, place.width), START, generator)}

    def read_width(self) -> int:
        return self.gate.shape[1]

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        return functional.linear(x, self.gate.to(x.dtype))

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        weights = masked_softmax(scores, mask) + self.bias.to(scores.dtype)
        return weights if mask is None else weights.masked_fill(~mask, 0.0)


class OutputGate(Weigher):
    """softmax(gate e / T): e are the outputs of the experts, or what the module or the layer reads."""

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        outputs = options["reads"] == "outputs" and options["per"] == "module"
        width = place.experts * place.out if outputs else place.width
        return {"gate": (place.experts, width), "log_temperature": (1,)}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        shape = cls.shapes(place, options)["gate"]
        return super().start(place, options, generator) | {"gate": draw(shape, START, generator)}

    def read_width(self) -> int:
        return self.gate.shape[1]

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        if self.reads is None and self.options["reads"] == "outputs":
            x = functional.layer_norm(outputs_of(x, bank).flatten(1), (self.gate.shape[1],), eps=GATE_EPS)
        return functional.linear(x, self.gate.to(x.dtype)) * torch.exp(-self.log_temperature.to(x.dtype))


def outputs_of(x: Tensor, bank: Any) -> Tensor:
    """x [T,D] -> B_e A_e x (+ bias_e) [T,E,O] of every expert, in x's type."""
    shrunk = torch.einsum("td,erd->etr", x, bank.lora_A.to(x.dtype))
    made = torch.bmm(shrunk, bank.lora_B.to(x.dtype).mT).transpose(0, 1)
    return made if bank.lora_bias is None else made + bank.lora_bias.to(x.dtype)


def check_mole(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for options of `mole` that it does not know or that exclude each other."""
    if options["reads"] not in ("outputs", "input") or options["per"] not in ("module", "layer"):
        raise ValueError(
            f"method '{method}': reads must be 'outputs' or 'input' and per 'module' or 'layer', got "
            f"{options['reads']!r} and {options['per']!r}"
        )


def layer_when_asked(path: str, options: Mapping[str, Any]) -> str | None:
    """The layer for per="layer"."""
    return layer_of(path) if options["per"] == "layer" else None


FLOW = Learned(weigher=FlowGate, where=layer_of, training={"steps": 250, "lr": 1e-3, "batch_size": 4})
LORA_FLOW = Method(
    name="lora_flow",
    summary="a trained gate per layer; softmax(G h) + b, shared by the layer's modules",
    paper="LoRA-Flow: Dynamic LoRA Fusion for Large Language Models in Generative Tasks, arXiv 2402.11455, section 3",
    taxonomy=SURVEY[18].taxonomy,
    plan=partial(learned_plan, method="lora_flow", learned=FLOW),
    routing=None,
    options={"routers": None},
    learned=FLOW,
    survey=18,
    differs="b starts at 0; the code, for two LoRAs, starts it at (-0.5, 0.5)",
)

MIXED = Learned(
    weigher=OutputGate,
    where=layer_when_asked,
    kept=("reads", "per"),
    leaves_out=True,
    check=check_mole,
    training={"steps": 400, "lr": 1e-3, "balance": 0.5},
)
MOLE = Method(
    name="mole",
    summary="a trained gate per module on all experts' outputs; softmax(G e / T), balanced",
    paper="Mixture of LoRA Experts, arXiv 2404.13628, section 3",
    taxonomy=SURVEY[23].taxonomy,
    plan=partial(learned_plan, method="mole", learned=MIXED),
    routing=None,
    options={"routers": None, "reads": "outputs", "per": "module", "without": None},
    learned=MIXED,
    survey=23,
    differs="a gate value per token; the paper has one per block and sequence of fixed length",
)

METEOR = Learned(training={"steps": 1000, "lr": 1e-3})
METEORA = Method(
    name="meteora",
    summary="a trained gate per module on the experts' own data; softmax over the 2 largest of G u",
    paper="MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053, section 3",
    taxonomy=SURVEY[25].taxonomy,
    plan=partial(learned_plan, method="meteora", learned=METEOR),
    routing=Routing(top_k=2, normalize="none", scale=1.0, weighting="softmax"),
    options={"routers": None},
    learned=METEOR,
    survey=25,
    differs="the gate starts smaller, and no dropout before A in training, as its code has",
)

ROWS = (LORA_FLOW, MOLE, METEORA)
