"""The router of the retrieval family: similarity of queries to embedded examples of the experts' data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from ..files.safefile import AdapterError
from .embedder import Embedder
from .index import index_file, read_index
from .router import Router
from .vectors import unit


class ExampleRouter(Router):
    """Scores queries against the indices that `index_examples` stored beside the experts.

    ValueError listing every expert without a usable index of this embedder.
    """

    source = "examples"

    def __init__(self, experts: ExpertBank, embedder: Embedder):
        self.names, self.embedder = experts.names, embedder
        self._mixtures: dict[int | None, tuple[Any, Tensor]] = {}  # by `samples`
        self.indices: list[Tensor] = []  # per expert [M,G], unit length
        problems = []
        for name in experts.names:
            try:
                self.indices.append(read_index(_index_folder(experts, name, embedder.name), embedder).vectors)
            except AdapterError as error:
                problems += [f"'{name}': {problem}" for problem in error.problems]
        if not problems and len({index.shape[1] for index in self.indices}) > 1:
            problems.append(f"the indices differ in width: {[index.shape[1] for index in self.indices]}")
        if problems:
            raise ValueError("the experts cannot be routed by their examples:\n- " + "\n- ".join(problems))

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> [N,E] float32, by options "neighbours" and "samples" (see `methods.retrieval`)."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        queries = unit(self.embedder(texts))
        if queries.shape[1] != self.indices[0].shape[1]:
            raise ValueError(
                f"embedder '{self.embedder.name}' gives vectors of {queries.shape[1]} numbers, the indices have "
                f"{self.indices[0].shape[1]}: it is not the model they were made with"
            )
        near, samples = options["neighbours"], options["samples"]
        if near == "mixture":
            return self._by_mixture(queries, samples)
        return torch.stack([_similarity(queries, index[:samples], near) for index in self.indices], 1)

    def _by_mixture(self, queries: Tensor, samples: int | None) -> Tensor:
        """[N,G] -> [N,E]: sum over the components c of a Gaussian mixture of p(c | query) p(expert | c).

        One component per expert, fitted to all examples together; p(expert | c) is the expert's part in what c
        explains, each expert counting the same however many examples it has.
        """
        if samples not in self._mixtures:
            try:
                from sklearn.mixture import GaussianMixture
            except ImportError as error:
                raise ImportError(
                    'neighbours="mixture" needs scikit-learn: pip install "moerge_ext[mixture]"'
                ) from error
            indices = [index[:samples].double() for index in self.indices]
            every = torch.cat(indices).numpy()
            count = min(len(indices), len(every))
            model = GaussianMixture(count, covariance_type="diag", reg_covar=1e-4, random_state=0).fit(every)
            shares = [torch.from_numpy(model.predict_proba(index.numpy())).mean(0) for index in indices]
            parts = torch.stack(shares, 1)  # [C,E]
            self._mixtures[samples] = (model, parts / parts.sum(1, keepdim=True).clamp_min(1e-12))
        model, parts = self._mixtures[samples]
        return (torch.from_numpy(model.predict_proba(queries.double().numpy())) @ parts).float()


def _similarity(queries: Tensor, index: Tensor, neighbours: int | str) -> Tensor:
    """queries [N,G], index [M,G], unit length -> [N]."""
    if neighbours == "centroid":
        return queries @ unit(index.mean(0))
    cosines = queries @ index.T
    if neighbours == "all":
        return cosines.mean(1)
    return cosines.topk(min(neighbours, len(index)), 1).values.mean(1)


def _index_folder(experts: ExpertBank, name: str, embedder: str) -> Path:
    """The first of an expert's folders that has an index of this embedder, or else the one where it is missed."""
    folders = [place for place in experts.places(name) if place.is_dir()]
    if not folders:
        raise AdapterError(["it was not loaded from a folder, so it has no index"])
    return next((folder for folder in folders if (folder / index_file(embedder)).exists()), folders[-1])
