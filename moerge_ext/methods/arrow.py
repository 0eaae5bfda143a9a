"""Arrow (arXiv 2405.11157): no gates to train; the LoRA's own top input direction is the prototype.

Score of expert e with prototype p_e (unit length, see `prototypes`), sign-agnostic, the token not normalized:

    s_e = |u . p_e| / T                    or |u . p_e| / (T sqrt(D)) with scale_by_width

then top-k and a softmax over the selected. An expert whose LoRA is zero here (B A = 0) has no direction and
is masked.

Options of every row:
    temperature      T > 0 (use it instead of `scale`)
    scale_by_width   divide by sqrt(D) too
    prototype        "svd" (exact) or "power_iteration" (PEFT's estimate, to compare with its results)
    iterations, seed of the power iteration

Rows:
    arrow            the paper's prototypes, top-4 and T = 1, but the selected experts' outputs are summed, that is
                     the products B A are averaged; the paper averages A and B apart: aggregation="factored"
    arrow_mttl       the authors' library: exact prototypes, T = 1, factors merged before they are applied;
                     top-4 as in its documented evaluation (its selector alone uses all experts)
    arrow_peft       PEFT's ArrowConfig: top-3, T = 1, power iteration; seed is its rng_seed (a new draw each
                     time by default there, 0 here). PEFT scores an expert with B A = 0 as 0 where we mask it.
    arrow_phatgoose  the baseline of PHATGOOSE (section 4.2) and GLIDER (5.2), top-2 so that it computes as much as they
                     do, and of the PHATGOOSE authors' code, which has T = 10 and 1/sqrt(D): the row to compare with
                     `phatgoose`. GLIDER's code
                     has T = 10 without 1/sqrt(D): scale_by_width=False.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..experts.bank import ExpertBank, ModuleBank
from .base import Method, Plan, Routing, is_finite_number, is_integer
from .gating import InverseTemperature, expert_mask
from .prototypes import power_iteration_prototypes, svd_prototypes
from .survey import SURVEY

PAPER = "Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157"
PROTOTYPES = ("svd", "power_iteration")
OUTPUTS = "the experts' outputs are summed, the paper averages their parameters (aggregation='factored')"


def arrow_plan(bank: ExpertBank, module_bank: ModuleBank, module_name: str, options: Mapping[str, Any]) -> Plan:
    """A routed `Plan`, prototypes as gates; experts without this module or without a direction are masked."""
    if options["prototype"] == "svd":
        gates, found = svd_prototypes(module_bank.lora_A, module_bank.lora_B)
    else:
        gates, found = power_iteration_prototypes(
            module_bank.lora_A, module_bank.lora_B, iterations=options["iterations"], seed=options["seed"]
        )
    return Plan(
        lora_A=module_bank.lora_A,
        lora_B=module_bank.lora_B,
        lora_bias=module_bank.lora_bias,
        gates=gates.contiguous(),
        mask=expert_mask(module_bank.present & found.cpu(), module_bank.device),
    )


def finish_arrow(routing: Routing, options: Mapping[str, Any], *, method: str) -> Routing:
    """Routing with the scale of `temperature` and `scale_by_width`; ValueError lists every bad option."""
    temperature, problems = options["temperature"], []
    if not (is_finite_number(temperature) and temperature > 0):
        problems.append(f"temperature must be a finite number > 0, got {temperature!r}")
    if routing.scale is not None:
        problems.append(f"give temperature (scores are divided by it) instead of scale={routing.scale!r}")
    if options["prototype"] not in PROTOTYPES:
        problems.append(f"prototype must be one of {', '.join(PROTOTYPES)}, got {options['prototype']!r}")
    if not isinstance(options["scale_by_width"], bool):
        problems.append(f"scale_by_width must be True or False, got {options['scale_by_width']!r}")
    if not (is_integer(options["iterations"]) and options["iterations"] >= 1):
        problems.append(f"iterations must be a positive integer, got {options['iterations']!r}")
    if not is_integer(options["seed"]):
        problems.append(f"seed must be an integer, got {options['seed']!r}")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))
    return replace(routing, scale=InverseTemperature(float(temperature), options["scale_by_width"]))


def _row(
    name: str,
    summary: str,
    paper: str,
    *,
    top_k: int,
    aggregation: str = "output",
    differs: str = "",
    **options: Any,
) -> Method:
    defaults = {
        "temperature": 1.0,
        "scale_by_width": False,
        "prototype": "svd",
        "iterations": 15,
        "seed": 0,
    }
    return Method(
        name=name,
        summary=summary,
        paper=paper,
        taxonomy=SURVEY[24].taxonomy,
        plan=arrow_plan,
        lora_only=True,
        routing=Routing(top_k=top_k, normalize="none", absolute=True, scale=None, weighting="softmax"),
        aggregation=aggregation,
        options=defaults | options,
        finish=partial(finish_arrow, method=name),
        survey=24,
        differs=differs,
    )


ROWS = (
    _row(
        "arrow",
        "p = top input direction of each LoRA, exact; |u.p|",
        f"{PAPER}, Arrow routing",
        top_k=4,
        differs=OUTPUTS,
    ),
    _row(
        "arrow_mttl",
        "as the authors' library runs it; |u.p|",
        f"{PAPER}, published code (mttl)",
        top_k=4,
        aggregation="factored",
    ),
    _row(
        "arrow_peft",
        "as PEFT runs it: p by power iteration; |u.p|",
        f"{PAPER}, as implemented in PEFT (ArrowConfig)",
        top_k=3,
        prototype="power_iteration",
        differs=f"top 3, p estimated by power iteration; {OUTPUTS}",
    ),
    _row(
        "arrow_phatgoose",
        "as in the PHATGOOSE authors' code; |u.p| / (10 sqrt(D))",
        f"{PAPER}; baseline in the published code of arXiv 2402.05859",
        top_k=2,
        temperature=10.0,
        scale_by_width=True,
        differs=f"top 2, scores divided by 10 sqrt(D); {OUTPUTS}",
    ),
)
