"""PHATGOOSE (arXiv 2402.05859): post-hoc sigmoid gates, routed by standardized similarity.

Score of expert e for the token u at one linear layer, with v_e the gate trained as sigmoid(v . u):

    s_e = LN(u) . LN(v_e) / sqrt(D)          LN: (a - mean) / sqrt(var + 1e-5), no affine

then top-2 and a softmax over the two. The published code takes a softmax over all E, keeps the two largest
and divides by their sum + 1e-6, which is the same up to 3e-6.
"""

from __future__ import annotations

from functools import partial

from ..experts.kinds import SIGMOID_GATE
from .base import Method, Routing
from .gating import gates_lacking, sigmoid_gate_plan
from .survey import SURVEY

PAPER = "Learning to Route Among Specialized Experts for Zero-Shot Generalization, arXiv 2402.05859"

TAXONOMY = SURVEY[16].taxonomy

PHATGOOSE = Method(
    name="phatgoose",
    summary="trained sigmoid gates v; LN(u).LN(v) / sqrt(D)",
    paper=f"{PAPER}, section 3",
    taxonomy=TAXONOMY,
    plan=sigmoid_gate_plan,
    routing=Routing(top_k=2, normalize="standardize", scale=None, weighting="softmax"),
    gate_kind=SIGMOID_GATE,
    lacks=partial(gates_lacking, kind=SIGMOID_GATE),
    survey=16,
)

ROWS = (PHATGOOSE,)
