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
        return torch.stack([_similarity(queries, index, options["neighbours"]) for index in self.indices], 1)


def _similarity(queries: Tensor, index: Tensor, neighbours: int | str) -> Tensor:
    """queries [N,G], index [M,G], unit length -> [N]."""
    if neighbours == "centroid":
        return queries @ unit(index.mean(0))
    cosines = queries @ index.T
    if neighbours == "all":
        return cosines.mean(1)
    return cosines.topk(min(neighbours, len(index)), 1).values.mean(1)
