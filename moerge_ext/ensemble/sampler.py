"""The model's own answers, as answer prompting samples them: once for a prompt, the same whenever they are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch

from ..queries.cache import TextCache
from .template import Turns


class Sampler:
    """(prompt, n) -> n sampled answers.

    Every prompt is sampled with a seed of its own, from `seed` and its text: what it gets does not depend on the
    questions before it, nor on whether a run was interrupted. The same prompt is sampled once: the expert alone and the
    ensembles that it is part of share its answers.
    """

    def __init__(self, sample: Callable[[Turns, int, int, Sequence[str]], list[str]], seed: int):
        self.sample, self.seed = sample, seed
        self.kept: dict[str, list[str]] = {}
        self.cache: TextCache | None = None
        self.identity = ""

    def keep(self, cache: TextCache, identity: str) -> None:
        """Keep the answers on disk as well, as those of the model of this identity."""
        self.cache, self.identity = cache, identity

    def __call__(self, prompt: Turns, count: int, *, limit: int, stop: tuple[str, ...] = ()) -> list[str]:
        asked = json.dumps([astuple(prompt), count, limit, stop, self.seed])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        if digest not in self.kept:
            known = self.cache.get("samples", self.identity, asked) if self.cache is not None else None
            self.kept[digest] = known or self._sampled(prompt, count, limit, stop, int(digest[:15], 16))
            if self.cache is not None and known is None:
                self.cache.put(self.kept[digest], "samples", self.identity, asked)
        return self.kept[digest]

    def _sampled(self, prompt: Turns, count: int, limit: int, stop: tuple[str, ...], seed: int) -> list[str]:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.sample(prompt, count, limit, stop)
