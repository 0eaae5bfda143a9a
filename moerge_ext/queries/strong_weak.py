"""RouteLLM: a strong and a weak expert, and the strong one only where it is likely to be better.

Ong et al. 2024, arXiv 2406.18665. P(strong wins | q) >= threshold takes the strong one. Two models of that probability:

    matrix factorization   sigmoid(d(strong, q) - d(weak, q)),  d(e, q) = w . (u_e (*) P embed(q)),  |u_e| = 1
    classifier             sigmoid(v . embed(q) + b), of one pair

trained by binary cross-entropy on the pairs of experts of which one was better (the classifier: on all questions, where
equally good counts for the weak one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .judged import Judged
from .linear_heads import L2, fit_probabilities
from .text_router import Stored, TextRouter, described_experts, embedded

NOISE = 0.1  # on the embedding while training, of the authors' script


def train_factorization(
    judged: Judged,
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    dim: int = 128,
    epochs: int = 100,
    lr: float = 3e-4,
    weight_decay: float = 1e-5,
    batch_size: int = 64,
    noise: float = NOISE,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Learn a vector per expert from every pair of experts that differ on a question; returns the file.

    The numbers are those of the authors' script. ValueError for other experts, and when no two experts differ anywhere.
    """
    marks = described_experts(experts, judged.names)
    for name, value in {"dim": dim, "epochs": epochs, "batch_size": batch_size, "lr": lr}.items():
        if not value > 0:
            raise ValueError(f"routellm: {name} must be positive, got {value}")
    judged.check_differing("routellm")
    pairs = won_pairs(judged.scores)
    vectors, probe = embedded(embedder, judged.texts)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = _Factors(len(judged.names), vectors.shape[1], dim)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
        bar = tqdm(range(epochs), desc="routellm", unit="epoch", disable=not progress)
        for _ in bar:
            losses = []
            for part in torch.randperm(len(pairs), device="cpu").split(batch_size):
                question, won, lost = pairs[part].T
                noisy = vectors[question] + noise * torch.randn(
                    len(part), vectors.shape[1], dtype=torch.float32, device="cpu"
                )
                loss = -nn.functional.logsigmoid(model(won, noisy) - model(lost, noisy)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    tensors |= {"probe": probe, "vectors": vectors, "shares": judged.scores.mean(0)}
    return Stored("routellm-mf", judged.names, tensors, {"dim": dim}, marks, embedder.name, embedder.max_length).save(
        output_dir
    )


def won_pairs(scores: Tensor) -> Tensor:
    """[P,3] (question, the better expert, the worse one), from scores [M,E]."""
    return (scores[:, :, None] > scores[:, None, :]).nonzero()


class _Factors(nn.Module):
    """d(e, q) [B] for experts [B] and vectors [B,G]."""

    def __init__(self, experts: int, width: int, dim: int):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(experts, dim, dtype=torch.float32, device="cpu"))
        self.project = nn.Parameter(
            nn.Linear(width, dim, bias=False, dtype=torch.float32, device="cpu").weight.detach()
        )
        self.classify = nn.Parameter(
            nn.Linear(dim, 1, bias=False, dtype=torch.float32, device="cpu").weight.detach()[0]
        )

    def forward(self, expert: Tensor, vectors: Tensor) -> Tensor:
        unit = nn.functional.normalize(self.experts[expert], dim=1)
        return (unit * (vectors @ self.project.T)) @ self.classify


def train_classifier(
    judged: Judged,
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    strong: str,
    weak: str,
    c: float = L2,
) -> Path:
    """Learn for one pair where `strong` is better than `weak`; returns the file.

    ValueError for other experts, and when the strong one is never better, or always.
    """
    marks = described_experts(experts, judged.names)
    check_pair(strong, weak, judged.names)
    better = judged.scores[:, judged.names.index(strong)] > judged.scores[:, judged.names.index(weak)]
    if better.all() or not better.any():
        raise ValueError(
            f"'{strong}' is better than '{weak}' {'always' if better.all() else 'never'}: nothing to learn"
        )
    vectors, probe = embedded(embedder, judged.texts)
    weight, bias = fit_probabilities(vectors, better.float()[:, None], c=c)
    tensors = {"weight": weight[0], "bias": bias, "probe": probe, "vectors": vectors}
    facts = {"strong": strong, "weak": weak, "c": c}
    return Stored("routellm-classifier", judged.names, tensors, facts, marks, embedder.name, embedder.max_length).save(
        output_dir
    )


def check_pair(strong: str, weak: str, names: Sequence[str]) -> None:
    """ValueError unless these are two of the experts."""
    unknown = [name for name in (strong, weak) if name not in names]
    if unknown or strong == weak:
        raise ValueError(f"strong and weak must be two of {', '.join(names)}; got '{strong}' and '{weak}'")


class StrongWeakRouter(TextRouter):
    """The weak expert, or the strong one where `win_rates` reach the threshold."""

    def pair(self, options: Mapping[str, Any]) -> tuple[str, str]:
        """The names of the strong and the weak one."""
        raise NotImplementedError

    def win_rates(self, vectors: Tensor, options: Mapping[str, Any]) -> Tensor:
        """P(strong wins) [N] for vectors [N,G]."""
        raise NotImplementedError

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the pair and the threshold; option `share` sets it, from the questions of the training."""
        strong, weak = self.pair(options)
        check_pair(strong, weak, self.choices)
        options = dict(options) | {"strong": strong, "weak": weak}
        if options["share"] is not None:
            rates = self.win_rates(self.stored.tensors["vectors"], options)
            options["threshold"] = torch.quantile(rates, 1 - options["share"]).item()
        return options

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        strong = self.win_rates(self.embed(texts), options) >= options["threshold"]
        values = torch.full((len(texts), len(self.choices)), -1.0, dtype=torch.float32, device="cpu")
        values[:, self.choices.index(options["weak"])] = 0.0
        values[strong, self.choices.index(options["strong"])] = 1.0
        return values


class FactorizationRouter(StrongWeakRouter):
    """Any pair of the experts; by default the one that is best and the one that is worst on the training questions."""

    kind = "routellm-mf"

    def pair(self, options: Mapping[str, Any]) -> tuple[str, str]:
        shares = self.stored.tensors["shares"][self.order].tolist()
        # the worst is sought from the last, so that two that are equal are a pair
        ranked = sorted(range(len(shares)), key=lambda i: -shares[i])
        strong = options["strong"] or next((n for i in ranked if (n := self.choices[i]) != options["weak"]), "")
        return strong, options["weak"] or next((n for i in ranked[::-1] if (n := self.choices[i]) != strong), "")

    def win_rates(self, vectors: Tensor, options: Mapping[str, Any]) -> Tensor:
        tensors, names = self.stored.tensors, self.stored.names
        unit = nn.functional.normalize(tensors["experts"], dim=1)
        gap = unit[names.index(options["strong"])] - unit[names.index(options["weak"])]
        return ((vectors @ tensors["project"].T) @ (gap * tensors["classify"])).sigmoid()


class ClassifierRouter(StrongWeakRouter):
    """The pair that it was trained for."""

    kind = "routellm-classifier"

    def pair(self, options: Mapping[str, Any]) -> tuple[str, str]:
        facts = self.stored.facts
        for role in ("strong", "weak"):
            if options[role] not in (None, facts[role]):
                raise ValueError(f"this classifier was trained with {role} = '{facts[role]}', got '{options[role]}'")
        return facts["strong"], facts["weak"]

    def win_rates(self, vectors: Tensor, options: Mapping[str, Any]) -> Tensor:
        return (vectors @ self.stored.tensors["weight"] + self.stored.tensors["bias"]).sigmoid()
