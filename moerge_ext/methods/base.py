"""What a routing method is: data that `patch` interprets, plus offline builders. No op is called here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.branches import Branches

HIDDEN_STATES = "the base model's hidden states"  # `Embedder.from_hidden_states`
OF_PATCH = ("method", "backend", "absent", "missing", "spare", "strict")  # its other arguments, for who mistypes one
GATE_EPS = 1e-5  # the epsilon of `route`'s standardization, used on gates as well


@dataclass(frozen=True)
class Routing:
    """The options of the `route` op (see `moerge_ext.ops.route`).

    `scale` may be a number, None (the op's default), or a function of (D, E) for methods whose scale depends
    on the layer's width or on the number of experts.
    """

    top_k: int | None = 2  # None: all experts
    normalize: str = "standardize"
    absolute: bool = False
    scale: float | Callable[[int, int], float] | None = None
    top_p: float | None = None
    weighting: str = "softmax"

    def resolved_scale(self, in_features: int, num_experts: int) -> float | None:
        """The number `route` gets for a layer of `in_features` (D) and `num_experts` (E).

        ValueError when a function `scale` returns anything but a finite number.
        """
        if not callable(self.scale):
            return self.scale
        scale = self.scale(in_features, num_experts)
        if not is_finite_number(scale):
            raise ValueError(f"scale(D={in_features}, E={num_experts}) must be a finite number, got {scale!r}")
        return scale


@dataclass(frozen=True)
class Plan:
    """What one patched module holds: the tensors of its branch.

    gates [E,D] float32 and mask [E] bool: routed by `route`. gates None: every expert of the (already merged
    or sliced) bank is applied with `weights` [E] float32, or token by token with those of `weigher`, a
    `weighing.Weigher`. branches: of the experts that are no LoRA here, which only a row that is `lora_only` leaves
    out.
    """

    lora_A: Tensor  # [E,R,D]
    lora_B: Tensor  # [E,O,R], O contiguous
    lora_bias: Tensor | None  # [E,O]
    gates: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    weigher: nn.Module | None = None
    branches: Branches = field(default_factory=dict)


@dataclass(frozen=True)
class Taxonomy:
    """The nine fields of the MoErging survey (Yadav et al. 2024, arXiv 2408.07057, Figure 1, infoboxes of section 3).

    What the survey describes has its values (`survey.py`). The defaults are for rows that it does not know: LoRA
    experts as anybody trains them, chosen per token and module without data.
    """

    expert_training: str = "Standard"
    expert_data: str = "Private"
    routing_dataset: str = "None"
    input_granularity: str = "Step"
    depth: str = "Module"
    selection: str = "Sparse"
    aggregation: str = "Output"
    generalization: str = "Out-of-Distribution"
    user_dataset: str = "Zero-Shot"


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    plan(bank, module_bank, module_name, options) builds a module's `Plan`; it raises ValueError listing what is missing
    (a gate, an expert). lacks(bank) lists the same for all modules and builds nothing; None when any bank will do.
    bias(affinities [N,E], options) -> [N,E] float32 turns per-row global affinities into
    the additive score bias of `route` (GLIDER); None when the method has no global part. `options` are the
    method's own parameters with their defaults; `patch(..., **options)` overrides them by name, and the fields of
    `routing` (top_k, top_p, ...) likewise.
    """

    name: str
    summary: str
    paper: str  # title, arXiv id, section
    taxonomy: Taxonomy
    plan: Callable[[ExpertBank, ModuleBank, str, Mapping[str, Any]], Plan]
    routing: Routing | None = Routing()  # None: nothing is routed (fixed weights)
    aggregation: str = "output"  # or "factored"
    bias: Callable[[Tensor, Mapping[str, Any]], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    # (routing, options) -> routing: for options that change the route's numbers, such as a temperature
    finish: Callable[[Routing, Mapping[str, Any]], Routing] | None = None
    lacks: Callable[[ExpertBank], list[str]] | None = None
    gate_kind: str | None = None  # the kind of gate it reads from the sidecars; None: it needs none
    # where the affinities come from: "instruction" (QueryRouter), "examples" (ExampleRouter), "ask" (AskRouter),
    # "few-shot" (solved examples of the task, LoraHub)
    source: str | None = None
    per_task: bool = False  # one row of affinities for all queries of a task
    together: bool = False  # what it makes of an expert depends on the others of the bank
    lora_only: bool = False  # computed from the factors of LoRA: no other kind of expert can take part
    embedder: str | None = None  # the paper's; HIDDEN_STATES is required, others are a recommendation
    learned: Any = None  # `learned.Learned`: the router that is trained over a bank; option `routers` holds it
    decodes: bool = False  # it chooses among whole models while they decode (`ensemble/co_llm.py`), and patches nothing
    survey: int | None = None  # n of the survey's section 3.n (1 to 29); None for what it does not describe
    differs: str = ""  # in what the row departs from its paper, or from the survey's words; "" for nothing

    @property
    def routes(self) -> bool:
        """Whether something is chosen or weighed in the model's layers while it runs: what `handle.record` shows."""
        return not self.decodes and (self.routing is not None or self.learned is not None)

    @property
    def router(self) -> str | None:
        """What tells the routers of an evaluation apart: `source`, or HIDDEN_STATES when the base embeds."""
        return HIDDEN_STATES if self.embedder == HIDDEN_STATES else self.source

    def configure(self, /, **overrides: Any) -> tuple[Routing | None, str, dict[str, Any]]:
        """(routing, aggregation, options) after the caller's overrides. ValueError names every unknown key."""
        routing_names = {f.name for f in fields(Routing)} if self.routing is not None else set()
        known = routing_names | set(self.options) | {"aggregation"}
        unknown = sorted(set(overrides) - known)
        if unknown:
            near = [get_close_matches(name, [*known, *OF_PATCH], 1, 0.8) for name in set(unknown).difference(OF_PATCH)]
            meant = ", ".join(sorted({found[0] for found in near if found}))
            hint = f"did you mean {meant}? It takes" if meant else "it takes"
            raise ValueError(
                f"method '{self.name}': unknown option(s) {', '.join(unknown)}; {hint} {', '.join(sorted(known))}"
            )
        options = {name: overrides.get(name, default) for name, default in self.options.items()}
        if self.learned is not None:
            options = self.learned.opened(self.name, options, overrides)
        routing = self.routing
        if routing is not None:
            routing = replace(routing, **{k: v for k, v in overrides.items() if k in routing_names})
            if self.finish is not None:
                routing = self.finish(routing, options)
            check_routing(self.name, routing)
        aggregation = overrides.get("aggregation", self.aggregation)
        if aggregation not in ("output", "factored"):
            raise ValueError(f"method '{self.name}': aggregation must be 'output' or 'factored', got {aggregation!r}")
        return routing, aggregation, options


def check_routing(name: str, routing: Routing) -> None:
    """ValueError, listing every option of `routing` that `route` would refuse."""
    problems = []
    if routing.top_k is not None and not (is_integer(routing.top_k) and routing.top_k >= 1):
        problems.append(f"top_k must be a positive integer or None (all experts), got {routing.top_k!r}")
    if routing.normalize not in ("standardize", "unit", "none"):
        problems.append(f"normalize must be 'standardize', 'unit' or 'none', got {routing.normalize!r}")
    if routing.weighting not in ("softmax", "softmax_all", "sigmoid", "score"):
        problems.append(f"weighting must be 'softmax', 'softmax_all', 'sigmoid' or 'score', got {routing.weighting!r}")
    if not isinstance(routing.absolute, bool):
        problems.append(f"absolute must be True or False, got {routing.absolute!r}")
    if routing.top_p is not None and not (is_finite_number(routing.top_p) and 0 < routing.top_p <= 1):
        problems.append(f"top_p must be a number in (0, 1] or None, got {routing.top_p!r}")
    if routing.scale is not None and not callable(routing.scale) and not is_finite_number(routing.scale):
        problems.append(f"scale must be a finite number, a function of (D, E), or None, got {routing.scale!r}")
    if problems:
        raise ValueError(f"method '{name}': " + "; ".join(problems))


def is_integer(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """True for a finite int or float; a bool is no number."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def standardize(vectors: Tensor, eps: float = GATE_EPS) -> Tensor:
    """(v - mean(v)) / sqrt(var(v) + eps) over the last dimension, biased variance, float32: [..., D] -> [..., D].

    PHATGOOSE's text has no eps, its code takes a LayerNorm, whose eps this is. It matters for gates that hardly moved
    from their start at zero: it makes the scores of one with a deviation of 0.01 5 % smaller, of 0.003 31 %.
    """
    return functional.layer_norm(vectors.float(), vectors.shape[-1:], eps=eps)
