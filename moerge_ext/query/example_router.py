"""The router of the retrieval family: similarity of queries to embedded examples of the experts' data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter_files.safefile import AdapterError
from ..experts import ExpertBank
from .embedder import Embedder, unit
from .index import read_index
from .router import Router


class ExampleRouter(Router):
    """Scores queries against the indices that `index_examples` stored beside the experts.

    ValueError listing every expert without a usable index, and those of another embedder.
    """

    source = "examples"
    task_examples = 32  # queries of a task that decide for all of it, by the methods with a pool

    def __init__(self, experts: ExpertBank, embedder: Embedder):
        self.names, self.embedder = experts.names, embedder
        self._mixture: tuple[Any, Tensor] | None = None
        self.indices: list[Tensor] = []  # per expert [M,G], unit length
        problems = []
        for name, folder in zip(experts.names, experts.folders, strict=True):
            try:
                if folder is None:
                    raise AdapterError(["it was not loaded from a folder, so it has no index"])
                index = read_index(folder)
            except AdapterError as error:
                problems += [f"'{name}': {problem}" for problem in error.problems]
                continue
            if index.embedder != embedder.name:
                problems.append(
                    f"'{name}' was indexed with embedder '{index.embedder}', the queries' is '{embedder.name}': use "
                    "that one, or index the expert again"
                )
            self.indices.append(index.vectors)
        if not problems and len({index.shape[1] for index in self.indices}) > 1:
            problems.append(f"the indices differ in width: {[index.shape[1] for index in self.indices]}")
        if problems:
            raise ValueError("the experts cannot be routed by their examples:\n- " + "\n- ".join(problems))

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> [N,E] float32, by options["neighbours"] (see `methods.retrieval`)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        queries = unit(self.embedder(texts))
        if queries.shape[1] != self.indices[0].shape[1]:
            raise ValueError(
                f"embedder '{self.embedder.name}' gives vectors of {queries.shape[1]} numbers, the indices have "
                f"{self.indices[0].shape[1]}: it is not the model they were made with"
            )
        if options["neighbours"] == "mixture":
            return self._by_mixture(queries)
        return torch.stack([_similarity(queries, index, options["neighbours"]) for index in self.indices], 1)

    def _by_mixture(self, queries: Tensor) -> Tensor:
        """[N,G] -> [N,E]: sum over the components c of a Gaussian mixture of p(c | query) p(expert | c).

        One component per expert, fitted to all examples together; p(expert | c) is the expert's part in what c
        explains, each expert counting the same however many examples it has.
        """
        if self._mixture is None:
            try:
                from sklearn.mixture import GaussianMixture
            except ImportError as error:
                raise ImportError(
                    'neighbours="mixture" needs scikit-learn: pip install "moerge_ext[mixture]"'
                ) from error
            every = torch.cat(self.indices).double().numpy()
            count = min(len(self.indices), len(every))
            model = GaussianMixture(count, covariance_type="diag", reg_covar=1e-4, random_state=0).fit(every)
            shares = [torch.from_numpy(model.predict_proba(index.double().numpy())).mean(0) for index in self.indices]
            parts = torch.stack(shares, 1)  # [C,E]
            self._mixture = (model, parts / parts.sum(1, keepdim=True).clamp_min(1e-12))
        model, parts = self._mixture
        return (torch.from_numpy(model.predict_proba(queries.double().numpy())) @ parts).float()


def _similarity(queries: Tensor, index: Tensor, neighbours: int | str) -> Tensor:
    """queries [N,G], index [M,G], unit length -> [N]."""
    if neighbours == "centroid":
        return queries @ unit(index.mean(0))
    cosines = queries @ index.T
    if neighbours == "all":
        return cosines.mean(1)
    return cosines.topk(min(neighbours, len(index)), 1).values.mean(1)
