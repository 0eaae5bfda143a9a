"""Average activation: the gate of an expert is the mean input of the module over the expert's own data.

`average_activation` is the baseline of the PHATGOOSE paper, run as its published code runs it: the router of
PHATGOOSE (both sides standardized, 1/sqrt(D), top-2); only the vectors differ.

`average_activation_mttl` is the default of the mttl library: u . v / sqrt(D) with neither side normalized, a
softmax over all experts (no top-k), and the factors merged before they are applied.

Option `gate_norm` ("standardize", "unit" or "none"): what is done once to the stored means.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from ..experts.kinds import AVERAGE_ACTIVATION as KIND
from .arrow import PAPER as ARROW_PAPER
from .base import Method, Routing
from .gating import InverseTemperature, average_activation_plan, check_gate_norm, gates_lacking
from .phatgoose import PAPER, TAXONOMY

AVERAGE_ACTIVATION = Method(
    name="average_activation",
    summary="v = mean input on the expert's data; LN(u).LN(v) / sqrt(D)",
    paper=f"{PAPER}, baseline 'Average Activation'",
    # not in the survey; PHATGOOSE's fields, since statistics of the expert's data are to it a custom training
    taxonomy=TAXONOMY,
    plan=average_activation_plan,
    routing=Routing(top_k=2, normalize="standardize", scale=None, weighting="softmax"),
    options={"gate_norm": "standardize"},
    finish=partial(check_gate_norm, method="average_activation"),
    gate_kind=KIND,
    lacks=partial(gates_lacking, kind=KIND),
)

AVERAGE_ACTIVATION_MTTL = Method(
    name="average_activation_mttl",
    summary="as the mttl library runs it; u.v / sqrt(D), all experts",
    paper=f"{ARROW_PAPER}, published code (mttl)",
    taxonomy=replace(TAXONOMY, selection="Dense", aggregation="Parameter"),
    plan=average_activation_plan,
    routing=Routing(top_k=None, normalize="none", scale=InverseTemperature(by_width=True), weighting="softmax"),
    aggregation="factored",
    options={"gate_norm": "none"},
    finish=partial(check_gate_norm, method="average_activation_mttl"),
    gate_kind=KIND,
    lacks=partial(gates_lacking, kind=KIND),
)

ROWS = (AVERAGE_ACTIVATION, AVERAGE_ACTIVATION_MTTL)
