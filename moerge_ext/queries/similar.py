"""Solved examples like a query, which the writer of its instruction sees (GLIDER, arXiv 2410.07172, section 4.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .index import index_file, read_index
from .vectors import unit
from .writer import Example

SHOWN = 3  # of the paper
SimilarExamples = Callable[[str], Sequence[Example]]


@dataclass(frozen=True)
class Nearest:
    """query -> the `count` of `rows` whose inputs are most similar to it, for `QueryRouter(similar=...)`.

    vectors [M,G] float32 of unit length are those of the rows' inputs by `embedder`. A row with the query's own input
    is left out. digest: of what it shows, and of the vectors that it chooses by.
    """

    embedder: Embedder
    rows: Sequence[Example]
    vectors: Tensor
    count: int = SHOWN
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if self.count < 1 or len(self.rows) < self.count:
            raise ValueError(f"expected at least {max(1, self.count)} solved examples, got {len(self.rows)}")
        said = [self.embedder.name, self.count, [[row["input"], row["target"]] for row in self.rows]]
        numbers = self.vectors.detach().cpu().contiguous().numpy().tobytes()
        object.__setattr__(self, "digest", hashlib.sha256(json.dumps(said).encode() + numbers).hexdigest()[:16])

    def __call__(self, query: str) -> list[Example]:
        order = (self.vectors @ unit(self.embedder([query]))[0]).argsort(descending=True, stable=True).tolist()
        return [self.rows[i] for i in order if self.rows[i]["input"] != query][: self.count]


def similar_examples(embedder: Embedder, rows: Sequence[Example], count: int = SHOWN) -> Nearest:
    """query -> the `count` of the solved `rows` ({"input", "target"}) that are most similar to it.

    ValueError for fewer than `count` rows.
    """
    if len(rows) < max(1, count):
        raise ValueError(f"expected at least {count} solved examples, got {len(rows)}")
    return Nearest(embedder, rows, unit(embedder([row["input"] for row in rows])), count)


def indexed_examples(experts: ExpertBank, embedder: Embedder, count: int = SHOWN) -> Nearest | None:
    """As `similar_examples`, of all that the experts' indices by this embedder hold with their texts.

    None when that is less than `count` rows. ValueError for an index that cannot be read, or vectors of another width.
    """
    rows: list[Example] = []
    vectors: list[Tensor] = []
    for name in experts.names:
        folders = [place for place in experts.places(name) if (place / index_file(embedder.name)).is_file()]
        index = read_index(folders[0], embedder) if folders else None
        if index is not None and index.rows is not None:
            rows += index.rows
            vectors.append(index.vectors)
    if len({part.shape[1] for part in vectors}) > 1:
        raise ValueError(f"the experts' indices differ in width: {[part.shape[1] for part in vectors]}; index again")
    return Nearest(embedder, rows, torch.cat(vectors), count) if len(rows) >= max(1, count) else None
