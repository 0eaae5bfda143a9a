"""Retrievers: from a question to passages, best first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..evaluation.identity import of_text
from ..files.rows import parse_json, read_text
from ..queries.embedder import Embedder
from ..queries.vectors import unit

SIMILARITIES = ("cosine", "dot")


class PassageIndex:
    """question -> the `count` passages most similar to it, best first.

    similarity: "cosine", or "dot", the dot product that Contriever (facebook/contriever, mean-pooled) is trained for.
    The search is scikit-learn's NearestNeighbors. It knows no dot product, so that passages x and questions q get one
    dimension more, sqrt(M^2 - |x|^2) with M the largest |x|, and 0: then |q - x|^2 = |q|^2 + M^2 - 2 q.x (Bachrach et
    al. 2014), whose nearest is that of the largest product. Everything is in memory: for some 100 000 passages.

    Errors: ValueError for no passages; ImportError with the install line without scikit-learn.
    """

    def __init__(self, embedder: Embedder, passages: Sequence[str], *, count: int, similarity: str = "cosine"):
        if not passages:
            raise ValueError("no passages to retrieve from")
        if similarity not in SIMILARITIES:
            raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
        try:
            from sklearn.neighbors import NearestNeighbors
        except ImportError as error:
            raise ImportError('an index of passages needs scikit-learn: pip install "moerge_ext[mixture]"') from error
        self.embedder, self.passages, self.similarity = embedder, list(passages), similarity
        vectors = self._vectors(self.passages).double()
        norms = vectors.square().sum(1)
        vectors = torch.cat([vectors, (norms.max() - norms).clamp_min(0).sqrt()[:, None]], 1)
        self.neighbours = NearestNeighbors(n_neighbors=min(count, len(self.passages))).fit(vectors.numpy())
        self.identity = of_text([similarity, embedder.name, self.passages])

    def __call__(self, question: str) -> list[str]:
        asked = torch.cat([self._vectors([question]).double(), torch.zeros(1, 1, dtype=torch.float32, device="cpu")], 1)
        return [self.passages[i] for i in self.neighbours.kneighbors(asked.numpy(), return_distance=False)[0]]

    def _vectors(self, texts: list[str]) -> torch.Tensor:
        vectors = self.embedder(texts)
        return unit(vectors) if self.similarity == "cosine" else vectors


class FoundPassages:
    """question -> the passages that some other search has found for it: {question: passages}."""

    def __init__(self, found: Mapping[str, Sequence[str]]):
        self.found = {question.strip(): list(passages) for question, passages in found.items()}
        self.identity = of_text(self.found)

    def __call__(self, question: str) -> list[str]:
        if question.strip() not in self.found:
            raise ValueError(f"no passages were found beforehand for {question[:80]!r}: search for it as well")
        return self.found[question.strip()]


def read_passages(file: Path) -> list[str] | FoundPassages:
    """A text file's passages, one per line; of JSON lines {"input", "passages": [str, ...]} what was found for each."""
    if not file.is_file():
        raise ValueError(
            f'there is no file {file}: expected one passage per line, or JSON lines {{"input", "passages"}}'
        )
    if file.suffix != ".jsonl":
        return [line.rstrip("\r") for line in read_text(file).split("\n") if line.strip()]
    found, problems = {}, []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        try:
            row = parse_json(line) if line.strip() else None
        except json.JSONDecodeError as error:
            problems.append(f"line {number}: not JSON ({error.msg})")
            continue
        if row is None:
            continue
        texts = row.get("passages") if isinstance(row, dict) and isinstance(row.get("input"), str) else None
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            found[row["input"]] = texts
        else:
            problems.append(f'line {number}: expected {{"input": str, "passages": [str, ...]}}')
    if problems or not found:
        raise ValueError(f"{file} cannot be used:\n- " + "\n- ".join(problems[:20] or ["the file has no rows"]))
    return FoundPassages(found)
