"""How much the words of a text are those of each expert's data, by scikit-learn's TF-IDF.

    s_e(x) = mean over the texts t of expert e of cos(tfidf(x), tfidf(t))

"What the Weight?", arXiv 2401.12756, one of its five scores. Inverse document frequencies are those of all the experts'
texts together.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank
from .embedder import Embedder
from .text_router import BASE, Stored, TextRouter, described_experts

SAMPLES = 100  # texts of an expert


def _vectorizer(**options: Any) -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError('TF-IDF needs scikit-learn: pip install "moerge_ext[queries]"') from error
    return TfidfVectorizer(**options)


def train_tfidf(
    data: Mapping[str, Sequence[str]],
    experts: ExpertBank | Sequence[str],
    output_dir: str | Path,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Path:
    """Keep the words of up to `samples` random texts of every expert, {name: texts}; returns the file.

    ValueError for other experts, for one without texts, and for texts without words.
    """
    marks = described_experts(experts, tuple(data))
    empty = [name for name, texts in data.items() if not texts]
    if empty or BASE in data or samples < 1:
        raise ValueError(
            f"expected texts for every expert and samples of at least 1; none for {', '.join(empty) or BASE}, "
            f"samples {samples}"
        )
    draw = random.Random(seed)
    drawn = {name: draw.sample(list(texts), min(samples, len(texts))) for name, texts in data.items()}
    fitted = _vectorizer().fit([text for texts in drawn.values() for text in texts])
    means = [torch.from_numpy(fitted.transform(texts).mean(0).A1) for texts in drawn.values()]
    words = [str(word) for word in fitted.get_feature_names_out()]
    tensors = {"means": torch.stack(means).float(), "idf": torch.from_numpy(fitted.idf_).float()}
    return Stored("tfidf", tuple(data), tensors, {"words": words, "samples": samples}, marks).save(output_dir)


class TfidfRouter(TextRouter):
    """Weights [N,E] for every text: see `kept`."""

    kind = "tfidf"

    def __init__(self, experts: ExpertBank | Sequence[str], embedder: Embedder | None, stored: Stored):
        super().__init__(experts, None, stored)  # it embeds by itself
        self._vectorizer = _vectorizer(vocabulary=stored.facts["words"])
        self._vectorizer.idf_ = stored.tensors["idf"].double().numpy()

    def values(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        vectors = torch.from_numpy(self._vectorizer.transform(texts).toarray()).float()
        return (vectors @ self.stored.tensors["means"].T)[:, self.order]

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        return kept(self.values([texts] if isinstance(texts, str) else list(texts), options), options["keep"])


def kept(scores: Tensor, keep: int | None) -> Tensor:
    """Scores [N,E] >= 0 -> the `keep` largest of each row divided by their sum; 1/E for all where all are 0."""
    count = scores.shape[1] if keep is None else min(keep, scores.shape[1])
    values, ids = scores.sort(dim=1, descending=True, stable=True)
    values, ids = values[:, :count], ids[:, :count]
    total = values.sum(1, keepdim=True)
    weights = torch.zeros_like(scores).scatter(1, ids, values / total.clamp_min(1e-12))
    return torch.where(total > 0, weights, 1 / scores.shape[1])
