"""Which tokens of a forward are real, and which only fill the batch up."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .state import RoutingState


class RealTokens:
    """Knows which tokens of the running forward are real, for the encoder and the decoder of a model.

    In a decoder-only model or an encoder those where `attention_mask` is not 0; in the decoder of an encoder-decoder
    those where `decoder_attention_mask` is not 0 or, without one, where `labels` is not -100. Its cross-attention keys
    and values read the encoder's tokens and follow `attention_mask`.

    Args:
        model: it, or its encoder and decoder, are watched until `stack` is closed.
        state: of a patched model: `model` is watched too, and only forwards of the request that has these tokens count.
            Without it `begin` is called with every batch.
    """

    def __init__(self, model: nn.Module, stack: ExitStack, state: RoutingState | None = None) -> None:
        self._state, self._now = state, threading.local()
        # of speech models, whose convolutions make a few vectors of many samples
        self._reduce = getattr(model, "_get_feature_vector_attention_mask", None)
        self._names = [] if state is None else list(inspect.signature(model.forward).parameters)
        if state is not None:
            stack.callback(model.register_forward_pre_hook(self._begin_forward, with_kwargs=True).remove)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder, decoder = model.get_encoder(), model.get_decoder()
            # `generate` calls the encoder by itself
            stack.callback(encoder.register_forward_pre_hook(self._encode, with_kwargs=True).remove)
            stack.callback(decoder.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            stack.callback(decoder.register_forward_hook(self._leave).remove)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=threading.local())

    def begin(self, batch: Mapping[str, Any]) -> None:
        """`batch`: the inputs of the forward that begins."""
        now, labels = self._now, batch.get("labels")
        now.in_decoder, now.encoded = False, None
        now.source = _of_tokens(batch.get("attention_mask"), batch, "input_ids", "inputs_embeds")
        now.target = _of_tokens(batch.get("decoder_attention_mask"), batch, "decoder_input_ids")
        if now.target is None and isinstance(labels, Tensor):
            now.target = labels != -100

    def mask(self, u: Tensor) -> Tensor | None:
        """[tokens] bool for u [..., D], or None when all of them count."""
        now = self._now
        encoded = getattr(now, "encoded", None)
        of_encoder = encoded is not None and _same(u, encoded)
        in_decoder = getattr(now, "in_decoder", False)
        mask = getattr(now, "target" if in_decoder and not of_encoder else "source", None)
        if mask is None:
            return None
        flattened = u.dim() == 2 and u.shape[0] == mask.numel()  # as mixture-of-experts blocks do
        if self._reduce is not None and u.dim() == 3 and u.shape[0] == mask.shape[0] and u.shape[1] < mask.shape[1]:
            mask = self._reduce(u.shape[1], mask.long()).bool()
        return mask.to(u.device).flatten() if flattened or mask.shape == u.shape[:-1] else None

    def _applies(self) -> bool:
        return self._state is None or self._state.of_forward().tokens is self

    def _begin_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._applies():
            self.begin(dict(zip(self._names, args, strict=False)) | kwargs)

    def _encode(self, _encoder: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._applies():
            self._now.in_decoder, self._now.encoded = False, None
            self._now.source = _of_tokens(kwargs.get("attention_mask"), kwargs, "input_ids", "inputs_embeds")

    def _enter(self, _decoder: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._applies():
            self._now.in_decoder, self._now.encoded = True, kwargs.get("encoder_hidden_states")

    def _leave(self, *_: Any) -> None:
        if self._applies():
            self._now.in_decoder, self._now.encoded = False, None


def _same(u: Tensor, encoded: Tensor) -> bool:
    # a graph of torch.compile has no addresses
    return u is encoded or (not torch.compiler.is_compiling() and u.data_ptr() == encoded.data_ptr())


def _of_tokens(mask: Any, batch: Mapping[str, Any], *inputs: str) -> Tensor | None:
    """[N, length] bool for the tokens of this forward; a cache's mask covers those before, too."""
    if isinstance(mask, Mapping):  # one for each kind of attention
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    tokens = next((batch[key] for key in inputs if isinstance(batch.get(key), Tensor)), None)
    if mask.dim() == 4:
        return _of_pairs(mask)
    if tokens is not None and tokens.dim() > 1 and mask.dim() == 2:
        mask = mask[:, -tokens.shape[1] :]
    return mask != 0


def _of_pairs(mask: Tensor) -> Tensor | None:
    """[N, queries] bool of a mask [N, 1, queries, keys] (bool, or 0 where read): some token reads a real token.

    The queries are the last of the keys that are read.
    """
    queries, keys = mask.shape[2:]
    if queries == 1:
        return None
    read = (mask if mask.dtype == torch.bool else mask == 0).any(2).any(1)  # [N, keys]
    position = torch.arange(keys, device=mask.device)
    last = torch.where(read.any(0), position, torch.zeros_like(position)).max()
    return read[:, (last - queries + 1 + position[:queries]).clamp_min(0)]
