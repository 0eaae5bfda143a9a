"""What the experts themselves say of a text: how likely it is under each, and how sure each is of its next tokens.

    prior     P(e | x) = p(x | e) / sum_j p(x | j)                     a uniform prior, as DEMix and "What the Weight?"
    entropy   s_e(x) = 1 / mean_t H(p(. | x_<t, e))                    lower uncertainty, larger weight

Both need a forward of the text under every expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.pretrained import context_of, is_seq2seq
from .router import Router
from .tfidf import kept


class LikelihoodRouter(Router):
    """Weights [N,E] by the model and its experts, of rows whose affinities are weights (`weight_prior`, ...).

    model: a decoder, to be patched with the method that asks; texts are cut at its context or `max_length`.
    ValueError for an encoder-decoder, and for a text of fewer than two tokens.
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
        """(log p(x | e) [N,E], mean entropy in nats [N,E]) float64, over all tokens but the first."""
        handle = getattr(self._model, "_moerge_handle", None)
        if handle is None or tuple(handle.names) != self.names:
            raise ValueError(f"patch the model with the experts {', '.join(self.names)} before it weighs them")
        sums = []
        for text in texts:
            ids = self._tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt").input_ids
            if ids.shape[1] < 2:
                raise ValueError(f"a text of fewer than two tokens has no likelihood: {text[:80]!r}")
            ids = ids.to(next(self._model.parameters()).device)
            sums.append([self._of_one(handle, ids, e) for e in range(len(self.names))])
        both = torch.tensor(sums, dtype=torch.float64)
        return both[..., 0], both[..., 1]

    @torch.no_grad()
    def _of_one(self, handle: Any, ids: Tensor, expert: int) -> tuple[float, float]:
        with handle.affinities(nn.functional.one_hot(torch.tensor(expert), len(self.names)).float()):
            logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        logs = logits.double().log_softmax(-1)
        chosen = logs.gather(1, ids[0, 1:, None]).sum()
        return chosen.item(), -(logs.exp() * logs).sum(1).mean().item()
