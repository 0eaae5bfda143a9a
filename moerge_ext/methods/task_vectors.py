"""Experts as task vectors B_e A_e that are added to the base's weights with factors from small networks.

    we_moe     lambda_e = F2 relu(F1 h + b1) + b2         h: what the MLP reads
    pwe_moe    lambda_e = F2 relu(F1 p + b1) + b2         p: the user's preference over the experts' tasks, fixed

    y_t = W u_t + sum_e lambda_e B_e A_e u_t              one network for every MLP; elsewhere lambda_e = `constant`

The factors are used as they are, no softmax; they start at `constant` (0.3), task arithmetic.

Where paper, survey and code differ, and what these rows do:

- Both papers add the whole differences of fully fine-tuned MLPs; here they are the LoRA experts' low-rank differences.
- `we_moe`: trained without labels on inputs of the test tasks, by the entropy of the model's predictions (paper and
  code; the survey says "the routing distribution's entropy"). Of a decoder that is the mean over all real tokens, where
  the paper has one class per image. The paper averages the router's outputs over the tokens of an example; a decoder
  that generates does not know the later ones, so that here every token has its own (granularity Step, not Example), and
  mean=True averages over each sequence of a forward, padding included, as the code does. `hidden` None is the width of
  h, as in the code; its F1 and F2 start normal with deviation 0.01.
- `pwe_moe`: p is drawn uniformly from the simplex at every step, and the loss is sum_e p_e L_e, L_e the model's loss on
  a batch of expert e's data: the paper's linear scalarization; its other loss (EPO) is not there. `preference` is given
  to `patch`, by default 1/E each.
- An MLP is a module whose name matches `mlp` (a regular expression); the router reads that module's input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, is_finite_number, is_integer
from .learned import Learned, learned_plan
from .survey import SURVEY
from .weighing import Place, Weigher, draw

MLP = r"(^|\.)(mlp|ffn|feed_forward|feedforward|DenseReluDense)$"
START = 0.01


class Constant(Weigher):
    """The same factor for every expert and token."""

    softmaxed = False

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {}

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        return x.new_full((len(x), bank.lora_A.shape[0]), self.options["constant"])

    def weigh(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores if mask is None else scores.masked_fill(~mask, 0.0)


class Network(Constant):
    """F2 relu(F1 v + b1) + b2."""

    @classmethod
    def inputs(cls, place: Place) -> int:
        """Numbers that the network reads."""
        return place.width

    @classmethod
    def shapes(cls, place: Place, options: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        read = cls.inputs(place)
        hidden = read if options["hidden"] is None else options["hidden"]
        return {"fc1": (hidden, read), "bias1": (hidden,), "fc2": (place.experts, hidden), "bias2": (place.experts,)}

    @classmethod
    def start(cls, place: Place, options: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        shapes = cls.shapes(place, options)
        made = {name: draw(shapes[name], START, generator) for name in ("fc1", "fc2")}
        return (
            super().start(place, options, generator)
            | made
            | {"bias2": torch.full(shapes["bias2"], float(options["constant"]), dtype=torch.float32, device="cpu")}
        )

    def factors(self, v: Tensor) -> Tensor:
        """v [T,inputs] -> [T,E]."""
        inner = functional.linear(v, self.fc1.to(v.dtype), self.bias1.to(v.dtype)).relu()
        return functional.linear(inner, self.fc2.to(v.dtype), self.bias2.to(v.dtype))


class EnsemblingNetwork(Network):
    """we_moe: of what the MLP reads."""

    def read_width(self) -> int:
        return self.fc1.shape[1]

    def of_block(self, u: Tensor) -> Tensor:
        factors = self.factors(u)
        if self.options["mean"] and u.dim() > 2:
            factors = factors.mean(-2, keepdim=True).expand(factors.shape)
        return self.weigh(factors.flatten(0, -2), self.without_mask())


class PreferenceNetwork(Network):
    """pwe_moe: of the preference, the same for every token."""

    @classmethod
    def inputs(cls, place: Place) -> int:
        return place.experts

    def __init__(self, tensors: Mapping[str, Tensor], options: Mapping[str, Any], reads: str | None = None):
        super().__init__(tensors, options, None)  # of no block's input: several modules share one network all the same
        self.preference = preference_of(options, len(self.bias2))

    def scores(self, x: Tensor, bank: Any) -> Tensor:
        p = self.preference.to(x.device, x.dtype)
        return self.factors(p[None]).expand(len(x), -1)


def preference_of(options: Mapping[str, Any], experts: int) -> Tensor:
    """Option `preference` as [E] that sums to 1: "0.5,0.3,0.2", numbers, or None for 1/E each.

    ValueError for another number of numbers, negative ones, or all 0.
    """
    given = options["preference"]
    if given is None:
        return torch.full((experts,), 1 / experts, dtype=torch.float32, device="cpu")
    try:
        numbers = torch.tensor(
            [float(n) for n in (given.split(",") if isinstance(given, str) else list(given))],
            dtype=torch.float32,
            device="cpu",
        )
    except (TypeError, ValueError):
        numbers = torch.empty(0, dtype=torch.float32, device="cpu")
    if numbers.shape != (experts,) or not numbers.isfinite().all() or (numbers < 0).any() or not numbers.any():
        raise ValueError(f"preference must be {experts} numbers, none negative and not all 0, got {given!r}")
    return numbers / numbers.sum()


def mlp_of(path: str, options: Mapping[str, Any]) -> str | None:
    """The MLP that holds a module, None for a module outside of one."""
    while path:
        path = path.rpartition(".")[0]
        if re.search(options["mlp"], path):
            return path
    return None


def check_task_vectors(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for options that are no number, no regular expression or out of range."""
    problems = []
    if not is_finite_number(options["constant"]):
        problems.append(f"constant must be a finite number, got {options['constant']!r}")
    if options["hidden"] is not None and not (is_integer(options["hidden"]) and options["hidden"] >= 1):
        problems.append(f"hidden must be a positive integer or None (the width it reads), got {options['hidden']!r}")
    try:
        re.compile(options["mlp"])
    except (TypeError, re.error) as error:
        problems.append(f"mlp must be a regular expression, got {options['mlp']!r} ({error})")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))


def _learned(weigher: type[Weigher], loss: str, **training: Any) -> Learned:
    return Learned(
        weigher=weigher,
        where=mlp_of,
        elsewhere=Constant,
        kept=("constant", "hidden", "mlp"),
        check=check_task_vectors,
        loss=loss,
        training=training,
    )


ENSEMBLING = _learned(EnsemblingNetwork, "entropy", steps=1000, lr=1e-4, batch_size=16)
WE_MOE = Method(
    name="we_moe",
    summary="task vectors of the MLPs with factors from a network per MLP, trained by entropy without labels",
    paper="Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, arXiv 2402.00433, section 4",
    taxonomy=SURVEY[15].taxonomy,
    plan=partial(learned_plan, method="we_moe", learned=ENSEMBLING),
    routing=None,
    options={"routers": None, "constant": 0.3, "hidden": None, "mean": False, "mlp": MLP},
    learned=ENSEMBLING,
    survey=15,
    differs="LoRA experts; every token has its own factors, mean=True averages over a sequence; outputs are mixed",
)

PARETO = _learned(PreferenceNetwork, "tasks", steps=1000, lr=1e-3, batch_size=4)
PWE_MOE = Method(
    name="pwe_moe",
    summary="task vectors of the MLPs with factors from your preference over the experts' tasks",
    paper="Towards Efficient Pareto Set Approximation via Mixture of Experts Based Model Fusion, arXiv 2406.09770",
    taxonomy=SURVEY[26].taxonomy,
    plan=partial(learned_plan, method="pwe_moe", learned=PARETO),
    routing=None,
    options={"routers": None, "constant": 0.3, "hidden": None, "preference": None, "mlp": MLP},
    learned=PARETO,
    survey=26,
    differs="LoRA experts; linear scalarization alone; outputs are mixed",
)

ROWS = (WE_MOE, PWE_MOE)
