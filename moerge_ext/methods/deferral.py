"""Co-LLM: at every token a gate on the base's last hidden state says who writes it, the base or one of the experts.

    P(x) = prod_t sum_z P(z | h_t) P_z(x_t | x_<t)       z = 0: the base alone; z = e: the base with expert e alone
    P(z | h_t) = softmax([0, theta_1 . h_t, ..., theta_E . h_t])_z       h_t [D]: what the base's output embeddings read

Of one expert this is sigmoid(theta . h_t), the paper's. Trained is theta [E,D] alone, by -log P(x) per token, from

    theta_e = the mean of the base's output embeddings, and then weak labels: z_t = e where expert e's likeliest token
    is x_t and the base's is not (of several such experts the one that finds x_t likeliest), else 0; the cross-entropy
    of P(z | h_t) with them, in which the labels of experts weigh `init_weight` times as much, for `init_steps`

Decoding: an expert writes where 1 - P(0 | h_t) > threshold, the likeliest of them; the token is its, or the base's,
likeliest one. Answers to choose from are ranked by P(x).

Where paper, survey and code differ, and what this row does:

- The paper trains the base's own weights together with theta; here base and experts are frozen, so that the experts
  still fit. Its assistants are other, larger models that share the base's vocabulary; here they are the base with one
  expert each.
- The paper and its code have one assistant. The softmax over several is ours, and with one it is theirs.
- theta has no bias, begins as the mean output embedding, and has weight 8 in its first stage, all as in the code, whose
  rate there is 2e-5 over 8000 steps; `init_steps` and rates are ours.
- The threshold: the code tries those that defer 0, 10, ..., 100 % of the tokens of a validation set and takes the one
  with the best generated answers; here, with validation data, the one whose speakers' likeliest tokens are right most
  often when the answer's earlier tokens are given; 0.5 without.
- The code asks the assistant only where it is needed; here all experts read every token beside the base, one row of the
  batch each: (1 + E) passes a token.
- The paper's text could not be had beyond its abstract; equations and details are those of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from .base import Method, is_finite_number, is_integer
from .learned import Learned
from .survey import SURVEY

GATE = "gate"  # the place of the tensors in the file
THETA, THRESHOLD = "theta", "threshold"
VOCABULARY = "vocabulary"  # the option of the file that says how many tokens the base knows


def log_choice(theta: Tensor, hidden: Tensor) -> Tensor:
    """theta [E,D], h [...,D] -> log P(z | h) [...,1+E] in theta's type, the base first."""
    scores = functional.linear(hidden.to(theta.dtype), theta)
    return functional.pad(scores, (1, 0)).log_softmax(-1)


def speakers(chances: Tensor, threshold: float) -> Tensor:
    """log P(z | h) [...,1+E] -> who writes the token [...], 0 for the base."""
    deferred = -torch.expm1(chances[..., 0])
    return torch.where(deferred > threshold, chances[..., 1:].argmax(-1) + 1, 0)


def weak_labels(right: Tensor, log_probs: Tensor) -> Tensor:
    """right [n,1+E] bool, log P_z(x_t) [n,1+E] -> z [n], 0 for the base, where it is right or nobody is."""
    best = log_probs[:, 1:].masked_fill(~right[:, 1:], -torch.inf).argmax(-1) + 1
    return torch.where(right[:, 1:].any(-1) & ~right[:, 0], best, 0)


def weak_loss(theta: Tensor, hidden: Tensor, labels: Tensor, weight: float) -> Tensor:
    """The mean over n tokens of -log P(z | h), times `weight` for z > 0."""
    losses = -log_choice(theta, hidden).gather(-1, labels[:, None])[:, 0]
    return torch.where(labels > 0, weight * losses, losses).mean()


def marginal_loss(theta: Tensor, hidden: Tensor, log_probs: Tensor) -> Tensor:
    """-log sum_z P(z | h) P_z(x_t), the mean over n tokens; log_probs [n,1+E]."""
    return -(log_choice(theta, hidden) + log_probs).logsumexp(-1).mean()


def no_plan(bank: Any, module_bank: Any, module_name: str, options: Mapping[str, Any]) -> NoReturn:
    """Why this row is no patch of layers."""
    raise ValueError(
        "method 'co_llm' chooses among whole models at every token, so that no layer is patched: ask with "
        "moerge_ext.CoLLM(model, tokenizer, experts, routers), or by `moerge eval` and `moerge generate`"
    )


def check_deferral(method: str, options: Mapping[str, Any]) -> None:
    """ValueError for numbers out of range."""
    steps, weight, threshold = options["init_steps"], options["init_weight"], options["threshold"]
    problems = []
    if not (is_integer(steps) and steps >= 0):
        problems.append(f"init_steps must be an integer from 0 on, got {steps!r}")
    if not (is_finite_number(weight) and weight > 0):
        problems.append(f"init_weight must be a positive number, got {weight!r}")
    if threshold is not None and not (is_finite_number(threshold) and 0 <= threshold <= 1):
        problems.append(f"threshold must be in [0, 1], or None for the one of the file, got {threshold!r}")
    if problems:
        raise ValueError(f"method '{method}': " + "; ".join(problems))


DEFERRED = Learned(
    kept=("init_steps", "init_weight"),
    check=check_deferral,
    training={"steps": 500, "lr": 3e-4},
    loss="deferral",
)
CO_LLM = Method(
    name="co_llm",
    summary="base or one expert writes each token; softmax([0, theta h]), h the base's last hidden state",
    paper="Learning to Decode Collaboratively with Multiple Language Models, arXiv 2403.03870, section 2",
    taxonomy=SURVEY[20].taxonomy,
    plan=no_plan,
    routing=None,
    options={"routers": None, "threshold": None, "init_steps": 200, "init_weight": 8.0},
    learned=DEFERRED,
    decodes=True,
    lora_only=True,
    survey=20,
    differs="the base is frozen; assistants are the base with an expert each, by a softmax when there are several",
)

ROWS = (CO_LLM,)
