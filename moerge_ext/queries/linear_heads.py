"""Logistic regressions with soft targets over embedded texts, by scikit-learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

L2 = 1.0  # scikit-learn's C


def fit_classes(vectors: Tensor, targets: Tensor, *, c: float = L2, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """(W [E,G], b [E]) that minimize

        -sum_m sum_e targets_me log softmax(W v_m + b)_e + |W|^2 / (2 c)

    for vectors [M,G] and targets [M,E] whose rows sum to 1: every question counts once for each expert, weighted by its
    target, so that up to a constant this is the sum of KL(targets_m || softmax(...)).
    """
    count, experts = targets.shape
    if experts == 1:
        return torch.zeros(1, vectors.shape[1], dtype=torch.float32, device="cpu"), torch.zeros(
            1, dtype=torch.float32, device="cpu"
        )
    weights = targets.clamp_min(torch.finfo(torch.float32).tiny)  # no class may be absent
    # of two, scikit-learn fits the difference w = W_1 - W_0, whose |w|^2 is twice |W|^2
    model = _logistic(2 * c if experts == 2 else c, steps)
    labels = torch.arange(experts, device="cpu").repeat_interleave(count)
    model.fit(vectors.double().repeat(experts, 1).numpy(), labels.numpy(), weights.double().T.reshape(-1).numpy())
    weight, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
    if experts == 2:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return weight, bias


def fit_probabilities(vectors: Tensor, targets: Tensor, *, c: float = L2, steps: int = 1000) -> tuple[Tensor, Tensor]:
    """(W [E,G], b [E]), one logistic regression for each column of targets [M,E] in 0 .. 1: minimizes for every e

    sum_m BCE(sigmoid(w_e v_m + b_e), targets_me) + |w_e|^2 / (2 c)
    """
    parts = []
    for column in targets.T:
        model = _logistic(c, steps)
        weights = torch.cat([1 - column, column]).clamp_min(torch.finfo(torch.float32).tiny)
        labels = torch.tensor([0, 1], device="cpu").repeat_interleave(len(column))
        model.fit(vectors.double().repeat(2, 1).numpy(), labels.numpy(), weights.double().numpy())
        parts.append((torch.from_numpy(model.coef_[0]).float(), float(model.intercept_[0])))
    return torch.stack([weight for weight, _ in parts]), torch.tensor(
        [bias for _, bias in parts], dtype=torch.float32, device="cpu"
    )


def _logistic(c: float, steps: int) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('training this router needs scikit-learn: pip install "moerge_ext[queries]"') from error
    return LogisticRegression(C=c, max_iter=steps, tol=1e-8)
