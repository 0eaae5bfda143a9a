"""What the experts themselves say of a text: how likely it is under each, and how sure each is of its next tokens.

    prior     P(e | x) = p(x | e) / sum_j p(x | j)                     a uniform prior, as DEMix and "What the Weight?"
    entropy   s_e(x) = 1 / mean_t H(p(. | x_<t, e))                    lower uncertainty, larger weight

Both need a forward of the text under every expert: rows of one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pretrained import context_of, is_seq2seq
from .router import Router
from .tfidf import kept

SIDE_BY_SIDE = 2048  # tokens of a forward in which several experts read a text: its logits are held at once


class LikelihoodRouter(Router):
    """Weights [N,E] by the model and its experts, of rows whose affinities are weights (`weight_prior`, ...).

    model: a decoder, to be patched with the method that asks; texts are cut at its context or `max_length`.
    ValueError for an encoder-decoder, and for a text without tokens.
    """

    source = "likelihood"

    def __init__(self, model: nn.Module, tokenizer: Any, names: Sequence[str], *, max_length: int = 512):
        if is_seq2seq(model.config):
            raise ValueError("the likelihood of a text needs a decoder, and this model is an encoder-decoder")
        self._model, self._tokenizer, self.names = model, tokenizer, tuple(names)
        self.max_length = min(max_length, context_of(model.config) or max_length)

    def scores(self, texts: Sequence[str], options: Mapping[str, Any]) -> Tensor:
        """texts (N) -> weights [N,E], by option "score": "prior" or "entropy"."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        likelihoods, entropies = self.measured(texts)
        found = likelihoods.softmax(1) if options["score"] == "prior" else 1 / entropies.clamp_min(1e-6)
        return kept(found.float(), options["keep"])

    def measured(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log p(x | e) [N,E], mean entropy in nats [N,E]) float64, over all tokens but the first.

        Both are 0 for a text of one token, of which nothing is predicted: it weighs all experts alike.
        """
        handle = getattr(self._model, "_moerge_handle", None)
        if handle is None or tuple(handle.names) != self.names:
            raise ValueError(f"patch the model with the experts {', '.join(self.names)} before it weighs them")
        known = {text: self._of_text(handle, text) for text in dict.fromkeys(texts)}
        both = torch.stack([known[text] for text in texts])
        return both[..., 0], both[..., 1]

    @torch.no_grad()
    def _of_text(self, handle: Any, text: str) -> Tensor:
        """[E,2] float64."""
        ids = self._tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt").input_ids
        if not ids.shape[1]:
            raise ValueError(f"a text without tokens has no likelihood: {text[:80]!r}")
        if ids.shape[1] == 1:
            return torch.zeros(len(self.names), 2, dtype=torch.float64, device="cpu")
        ids, found = ids.to(next(self._model.parameters()).device), []
        for experts in torch.eye(len(self.names), dtype=torch.float32, device="cpu").split(
            max(1, SIDE_BY_SIDE // ids.shape[1])
        ):
            rows = ids.expand(len(experts), -1)
            with handle.affinities(experts):
                logits = self._model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, :-1]
            found += [_measured(one, ids[0, 1:]) for one in logits]
        return torch.stack(found)


def _measured(logits: Tensor, ids: Tensor) -> Tensor:
    """logits [T,V] of the tokens ids [T] -> (log p(ids), mean entropy) [2] float64, on the CPU."""
    logs = logits.double().log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(1).mean()
    return torch.stack([logs.gather(1, ids[:, None]).sum(), entropy]).cpu()
