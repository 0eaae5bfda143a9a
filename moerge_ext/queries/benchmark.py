"""Routing with benchmark datasets: experts by how right they were on the questions most like these.

Shnitzer et al. 2023, arXiv 2309.15789. g_e(x) is the mean correctness of expert e on the k benchmark questions nearest
to x (cosine), `right_e(x) = [g_e(x) > t]`; over the queries x_1 .. x_n of a task

    s1: S_e = mean_i g_e(x_i)
    s2: S_e = mean_i right_e(x_i)
    s3: S_e = p_e s2_e + (1 - p_e) (1 - s2_e)     p_e: how often `right_e` is true on data that far from the benchmark

p_e is a Gaussian kernel smoother over the benchmark's own data sets, each left out in turn: how accurate `right_e` was
on it, by the mean distance of its questions to their neighbours in the others. Under s3 the expert that is best on the
benchmark as a whole stays unless the probability that the found one is better, by a normal approximation of the
difference of the two means, is above `confidence`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .judged import Judged
from .text_router import Stored, TextRouter, described_experts, embedded

NEIGHBOURS, THRESHOLD = 5, 0.5


def train_benchmark(
    judged: Judged,
    experts: ExpertBank | Sequence[str],
    embedder: Embedder,
    output_dir: str | Path,
    *,
    neighbours: int = NEIGHBOURS,
    threshold: float = THRESHOLD,
) -> Path:
    """Keep embedded benchmark questions with their correctness, and how reliable the estimates are by distance.

    neighbours, threshold: k and t of the estimates whose reliability is measured here. Returns the file. ValueError for
    other experts or scores outside 0 .. 1.
    """
    marks, scores = described_experts(experts, judged.names), judged.correctness()
    judged.check_differing("benchmark")
    vectors, probe = embedded(embedder, judged.texts)
    names = list(dict.fromkeys(judged.tasks))
    tasks = torch.tensor([names.index(task) for task in judged.tasks], dtype=torch.long, device="cpu")
    tensors = {"vectors": vectors, "scores": scores, "probe": probe}
    if len(names) > 1:
        held = [_held_out(vectors, scores, tasks == task, neighbours, threshold) for task in range(len(names))]
        tensors["distances"] = torch.tensor([distance for distance, _ in held], dtype=torch.float32, device="cpu")
        tensors["accuracies"] = torch.stack([accuracy for _, accuracy in held])
    facts = {"tasks": names, "neighbours": neighbours, "threshold": threshold}
    return Stored("benchmark", judged.names, tensors, facts, marks, embedder.name, embedder.max_length).save(output_dir)


def _held_out(
    vectors: Tensor, scores: Tensor, inside: Tensor, neighbours: int, threshold: float
) -> tuple[float, Tensor]:
    """(mean distance of one data set's questions to the others, how often `right` is true on it [E])."""
    estimates, distances = nearest(vectors[inside], vectors[~inside], scores[~inside], neighbours)
    return distances.mean().item(), ((estimates > threshold) == (scores[inside] > threshold)).float().mean(0)


def nearest(queries: Tensor, vectors: Tensor, scores: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """(g [N,E], mean cosine distance to the neighbours [N]) of queries [N,G] among vectors [M,G], of unit length."""
    try:
        from sklearn.neighbors import NearestNeighbors
    except ImportError as error:
        raise ImportError('benchmark routing needs scikit-learn: pip install "moerge_ext[queries]"') from error
    search = NearestNeighbors(n_neighbors=min(neighbours, len(vectors)), metric="cosine", algorithm="brute")
    distances, ids = search.fit(vectors.numpy()).kneighbors(queries.numpy())
    return scores[torch.from_numpy(ids)].mean(1), torch.from_numpy(distances).mean(1).float()


class BenchmarkRouter(TextRouter):
    """The best expert for all the texts together (or, with estimator "query", for each by g). See the module."""

    kind = "benchmark"

    def settings(self, method: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """ValueError for s3 without two data sets, or with other numbers than its reliability was measured for."""
        if options["estimator"] == "s3":
            if "accuracies" not in self.stored.tensors:
                raise ValueError(
                    f"method '{method}': estimator s3 measures its reliability between benchmark data sets, and the "
                    f"router knows {len(self.stored.facts['tasks'])}: train it on two or more, or pass estimator=s1"
                )
            other = [key for key in ("neighbours", "threshold") if options[key] != self.stored.facts[key]]
            if other:
                raise ValueError(
                    f"method '{method}': the reliability of s3 was measured with "
                    + ", ".join(f"{key}={self.stored.facts[key]}" for key in other)
                    + "; train the router with the same numbers"
                )
        return dict(options)

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        tensors = self.stored.tensors
        scores = tensors["scores"][:, self.order]
        found, distances = nearest(self.embed(texts), tensors["vectors"], scores, options["neighbours"])
        if options["estimator"] == "query":
            return found
        if options["estimator"] == "s1":
            return found.mean(0, keepdim=True)
        right = (found > options["threshold"]).float().mean(0)
        if options["estimator"] == "s2":
            return right[None]
        return self._reliable(right, distances.mean(), len(texts), scores.mean(0), options)[None]

    def _reliable(
        self, right: Tensor, distance: Tensor, count: int, known: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """s3 [E'], with 1 added to the benchmark's best expert where the found one is not surely better."""
        tensors = self.stored.tensors
        p = smoothed(distance, tensors["distances"], tensors["accuracies"][:, self.order], options["bandwidth"])
        estimate = p * right + (1 - p) * (1 - right)
        found, best = int(estimate.argmax()), int(known.argmax())
        if found == best:
            return estimate
        spread = ((estimate * (1 - estimate))[[found, best]].sum() / count).sqrt().clamp_min(1e-6)
        better = 0.5 * (1 + math.erf(((estimate[found] - estimate[best]) / spread).item() / math.sqrt(2)))
        if better <= options["confidence"]:
            estimate[best] += 1
        return estimate


def smoothed(at: Tensor, points: Tensor, values: Tensor, bandwidth: float) -> Tensor:
    """Nadaraya-Watson: values [P,E] known at points [P], at a number `at` -> [E]."""
    exponent = -0.5 * ((at - points) / bandwidth).square()
    weights = (exponent - exponent.max()).exp()
    return (weights[:, None] * values).sum(0) / weights.sum()
