"""A stand-in for vLLM's engine: the base patched anew for what each request says, one request after another."""

from __future__ import annotations

from typing import Any

import torch

import moerge_ext as moerge
from moerge_ext.models.pretrained import load_model
from moerge_ext.serving.pool import rules

STARTED: list[StandIn] = []  # every engine that was made, in order


class StandIn:
    """Instead of `serving.vllm.offline.Offline`, with the checks that the plugin makes of requests."""

    def __init__(self, model: str, settings: Any, options: dict[str, Any]):
        self.model, self.settings, self.options = load_model(model, dtype="float32", device="cpu"), settings, options
        self.running, self.starts, self.said = False, 0, []
        self.experts = None if settings is None else settings.load(None)
        STARTED.append(self)

    def start(self) -> None:
        self.starts += not self.running
        self.running = True

    def close(self) -> None:
        self.running = False

    def write(self, prompts, routing, limit, ends, repetition_penalty):
        found = []
        for ids, said in zip(prompts, routing, strict=True):
            written: list[int] = []
            while len(written) < limit and not set(written[-1:]) & set(ends):
                written.append(self._scores([*ids, *written], said)[-1].argmax().item())
            found.append(written)
        return found

    def log_probs(self, prompts, answers, routing):
        found = []
        for ids, answer, said in zip(prompts, answers, routing, strict=True):
            scores = self._scores(ids + answer, said)[len(ids) - 1 : -1].log_softmax(-1)
            found.append(scores.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
        return found

    @torch.no_grad()
    def _scores(self, ids: list[int], said: Any) -> torch.Tensor:
        assert self.running
        self.said.append(said)
        if self.settings is None:
            assert said is None
            return self.model(torch.tensor([ids])).logits[0]
        choice = rules(self.settings, self.experts.names).read(said)
        method = self.settings.method if choice is None else "given" if choice.weights else choice.method
        if method is None:
            return self.model(torch.tensor([ids])).logits[0]
        options = self.settings.variants().get(method, {})
        with moerge.patch(self.model, self.experts, method, **options) as handle:
            return self._routed(handle, choice, ids)

    def _routed(self, handle: moerge.Handle, choice: Any, ids: list[int]) -> torch.Tensor:
        given = None if choice is None else choice.weights or choice.affinities
        if given is None:
            return self.model(torch.tensor([ids])).logits[0]
        with handle.affinities(torch.tensor(given)[None]):
            return self.model(torch.tensor([ids])).logits[0]
