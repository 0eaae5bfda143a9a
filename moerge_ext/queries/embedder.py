"""Embedder: texts to vectors, by sentence-transformers, a transformers encoder, the base model, or any callable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..files.hub import model_options
from .cache import TextCache, model_identity, model_name
from .vectors import mean_pool, unit

PROBE = "Which of the experts should answer this question?"  # embedded again to see that the embedder is the same
SAME = 0.99  # cosine of one text embedded twice by one model, with room for another device or precision


class Embedder:
    """Texts -> vectors [N,G] float32 on the CPU.

    Args:
        embed: list of texts -> [N,G] (tensor, array or lists), any callable.
        name: of the model; experts and queries must be embedded by embedders of one name.
        prefix: put before every text (some models want "search_query: " or the like); part of the name.
        cache, identity: as in InstructionWriter; prefix and max_length need not be part of the identity.
        batch_size: texts per call of `embed`.
        max_length: how many tokens of a text `embed` reads, None where that is not known.
        of_base: the vectors are hidden states of the base model.
    """

    def __init__(
        self,
        embed: Callable[[list[str]], Any],
        *,
        name: str,
        prefix: str = "",
        cache: TextCache | None = None,
        identity: str | None = None,
        batch_size: int = 64,
        max_length: int | None = None,
        of_base: bool = False,
    ):
        if not callable(embed):
            raise ValueError(f"embed must be a callable texts -> [N, G], got {type(embed).__name__}")
        self.embed, self.prefix, self.cache, self.batch_size = embed, prefix, cache, batch_size
        self.name = f"{name} (prefix {prefix!r})" if prefix else name
        self.identity, self.max_length, self.of_base = identity or self.name, max_length, of_base
        self.asked: Counter[str] = Counter()  # "texts": how many it was given, those of the cache too

    @classmethod
    def from_sentence_transformers(
        cls,
        path: str,
        *,
        name: str | None = None,
        prefix: str = "",
        device: str = "cpu",
        trust_remote_code: bool = False,
        cache: TextCache | None = None,
        batch_size: int = 64,
    ) -> Embedder:
        """A sentence-transformers model (hub id or folder); texts beyond its `max_seq_length` are cut by it.

        What pools by the mean is padded on the right, as in `from_transformers`.
        name: default the last part of `path`; name a folder after the model that is in it.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError('this embedder needs sentence-transformers: pip install "moerge_ext[embed]"') from error
        from ..models.pretrained import named, usable_device

        device, options = str(usable_device(device)), model_options(path)
        with named(path, "sentence-transformers model"):
            model = SentenceTransformer(path, device=device, trust_remote_code=trust_remote_code, **options)
        # "mean" is the attribute from release 6 on, and the method's answer before
        means = ["mean" in (getattr(m, "pooling_mode", ""), getattr(m, "get_pooling_mode_str", str)()) for m in model]
        if any(means) and hasattr(model.tokenizer, "padding_side"):
            model.tokenizer.padding_side = "right"

        def embed(texts: list[str]) -> Tensor:
            return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, batch_size=batch_size)

        how = f"sentence-transformers, trust_remote_code={trust_remote_code}"
        return cls._of_model(embed, path, how, name, prefix, cache, batch_size, getattr(model, "max_seq_length", None))

    @classmethod
    def from_transformers(
        cls,
        path: str,
        *,
        name: str | None = None,
        prefix: str = "",
        device: str = "cpu",
        max_length: int = 512,
        cache: TextCache | None = None,
        batch_size: int = 64,
    ) -> Embedder:
        """A transformers encoder (or the encoder of an encoder-decoder): the mean of its last hidden states over the
        text's tokens, of which the first `max_length` are read.

        A tokenizer that pads on the left, as decoders' do, is told to pad and cut on the right: what counts positions
        from the start of a row (GPT-2) would give a text other vectors beside a longer one than alone.
        """
        from transformers import AutoModel

        from ..models.pretrained import is_seq2seq, load_tokenizer, location, named, usable_device

        (where, options), tokenizer, device = location(path), load_tokenizer(path), usable_device(device)
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        with named(path, "encoder"):
            model = AutoModel.from_pretrained(where, **options).float().eval().to(device)
        model = model.get_encoder() if is_seq2seq(model.config) else model

        def embed(texts: list[str]) -> Tensor:
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            inputs = inputs.to(next(model.parameters()).device)
            with torch.no_grad():
                hidden = model(**inputs).last_hidden_state
            return mean_pool(hidden, inputs["attention_mask"])

        return cls._of_model(embed, path, "mean", name, prefix, cache, batch_size, max_length)

    @classmethod
    def from_hidden_states(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        layer: int = -2,
        name: str | None = None,
        max_length: int = 512,
        batch_size: int = 16,
    ) -> Embedder:
        """The base model as embedder (DAM): the mean of its hidden state `layer` over a text's tokens, without experts.

        model: loaded, patched or not; layer: -2 is the penultimate one; name: default the model's own. Keeps no cache.
        """
        from .hidden import base_name, hidden_states

        name = name or base_name(getattr(model.config, "_name_or_path", ""))
        embed = hidden_states(model, tokenizer, layer, max_length)
        name = f"{name} hidden state {layer}"
        return cls(embed, name=name, batch_size=batch_size, max_length=max_length, of_base=True)

    @classmethod
    def _of_model(cls, embed, path: str, how: str, name: str | None, prefix: str, cache, batch_size, max_length):
        """how: what the vectors depend on besides the model's files, the prefix and max_length."""
        return cls(
            embed,
            name=name or model_name(path),
            prefix=prefix,
            cache=TextCache() if cache is None else cache,
            identity=f"{model_identity(path)} {how}",
            batch_size=batch_size,
            max_length=max_length,
        )

    @cached_property
    def probe(self) -> Tensor:
        """[G] of unit length, of PROBE: kept with what this embedder has made. Errors as of a call."""
        return unit(self([PROBE]))[0]

    def differs(self, probe: Tensor | None, max_length: int | str | None) -> str | None:
        """How the embedder whose probe [G] and max_length were kept differs from this one; None where nothing says so.

        Errors as of a call.
        """
        if max_length is not None and self.max_length is not None and str(max_length) != str(self.max_length):
            return f"which read {max_length} tokens of a text, not {self.max_length}"
        if probe is not None and (probe.shape != self.probe.shape or not self.probe @ unit(probe) >= SAME):
            return f"which gave another vector to the same text (cosine below {SAME}, or another width)"
        return None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """texts (N) -> [N,G] float32, not normalized.

        ValueError for no texts, an empty text, or an `embed` that returns another number of rows, no vectors, values
        that are not finite, or a zero vector (which has no direction).
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("no texts to embed: expected at least one")
        empty = [i for i, text in enumerate(texts) if not isinstance(text, str) or not text.strip()]
        if empty:
            raise ValueError(f"texts must not be empty; number {', '.join(map(str, empty[:5]))} (from 0) is")
        self.asked["texts"] += len(set(texts))
        rows: dict[str, Tensor] = {}
        if self.cache is not None:
            for text in dict.fromkeys(texts):
                if (known := self.cache.get(*self._key(text))) is not None:
                    rows[text] = torch.tensor(known, dtype=torch.float32, device="cpu")
        todo = [text for text in dict.fromkeys(texts) if text not in rows]
        for start in range(0, len(todo), self.batch_size):
            part = todo[start : start + self.batch_size]
            for text, row in zip(part, self._vectors(part), strict=True):
                rows[text] = row
                if self.cache is not None:
                    self.cache.put(row.tolist(), *self._key(text))
        return torch.stack([rows[text] for text in texts])

    def _key(self, text: str) -> tuple[str, ...]:
        return "embedding", self.identity, self.prefix, str(self.max_length), text

    def _vectors(self, texts: list[str]) -> Tensor:
        made = self.embed([self.prefix + text for text in texts])
        vectors = torch.as_tensor(made, dtype=torch.float32, device="cpu").detach()
        if vectors.dim() != 2 or vectors.shape[0] != len(texts) or vectors.shape[1] == 0:
            raise ValueError(f"embedder '{self.name}' must return [N={len(texts)}, G], got {list(vectors.shape)}")
        if not vectors.isfinite().all() or (vectors.norm(dim=1) == 0).any():
            raise ValueError(f"embedder '{self.name}' returned a vector that is zero or not finite")
        return vectors.clone()  # an inference tensor could not be used in autograd


def load_embedder(path: str, *, mean_pool: bool = False, **options: Any) -> Embedder:
    """The embedder of a model, as sentence-transformers reads it or, with `mean_pool`, as transformers does; options as
    of both ways."""
    make = Embedder.from_transformers if mean_pool else Embedder.from_sentence_transformers
    return make(path, **options)
