"""Whole models behind one router of texts: local ones and OpenAI-compatible servers, with what every answer costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..evaluation.answers import Answerer
from ..methods import get_method
from ..queries.endpoint import Endpoint
from ..queries.judged import Judged
from ..queries.text_router import TextRouter
from .judge import Judge, judged


@dataclass(frozen=True)
class Answer:
    """What `model` said; tokens of prompt and answer together, and what they cost."""

    text: str
    model: str
    tokens: int
    cost: float


@dataclass(frozen=True)
class PoolModel:
    """One model. ask(question) -> (answer, tokens of prompt and answer); cost_per_token in a unit that all share."""

    name: str
    ask: Callable[[str], tuple[str, int]]
    cost_per_token: float

    def __post_init__(self) -> None:
        if not self.name or not 0 <= self.cost_per_token < float("inf"):
            raise ValueError(
                f"a model of a pool needs a name and a finite cost per token of at least 0, got {self.name!r} and "
                f"{self.cost_per_token}"
            )

    @classmethod
    def local(
        cls, name: str, model: nn.Module, tokenizer: Any, *, cost_per_token: float, max_new_tokens: int = 64
    ) -> PoolModel:
        """A loaded model, greedy."""
        asked = Answerer(model, tokenizer)

        def ask(question: str) -> tuple[str, int]:
            (text,) = asked.generate([question], max_new_tokens)
            return text, len(asked.prompt_ids(question)) + len(tokenizer(text, add_special_tokens=False).input_ids)

        return cls(name, ask, cost_per_token)

    @classmethod
    def endpoint(cls, name: str, endpoint: Endpoint, *, cost_per_token: float) -> PoolModel:
        """A server, whose own count of tokens is taken; EndpointError when it reports none."""
        return cls(name, endpoint.counted, cost_per_token)

    def answer(self, question: str) -> Answer:
        text, tokens = self.ask(question)
        return Answer(text, self.name, tokens, tokens * self.cost_per_token)


class ModelPool:
    """Models with distinct names; `names` in their order. ValueError for none, and for a name given twice."""

    def __init__(self, models: Sequence[PoolModel]):
        self.models, self.names = tuple(models), tuple(model.name for model in models)
        if not models or len(set(self.names)) != len(self.names):
            raise ValueError(f"a pool needs models with distinct names, got {list(self.names)}")

    def answer(
        self, questions: Sequence[str], router: TextRouter, method: str, *, progress: bool = True, **options: Any
    ) -> list[Answer]:
        """Each question answered by the one model that `router` chooses under the options of a row of METHODS.

        router: `load_text_router(folder, pool.names, embedder)`. ValueError for a router of other models or of another
        kind than the method's.
        """
        if not isinstance(router, TextRouter) or tuple(router.choices) != self.names:
            got = f"{type(router).__name__} of {', '.join(getattr(router, 'names', ()))}"
            raise ValueError(f"this pool needs a router of {', '.join(self.names)}, got {got}")
        row = get_method(method)
        if row.source != router.source:
            raise ValueError(f"method '{method}' takes a router by {row.source}, got one by {router.source}")
        questions = [questions] if isinstance(questions, str) else list(questions)
        chosen = router.chosen(questions, router.settings(method, row.configure(**options)[2])).expand(len(questions))
        bar = tqdm(list(zip(questions, chosen.tolist(), strict=True)), unit="q", disable=not progress)
        return [self.models[number].answer(question) for question, number in bar]

    def answer_all(self, questions: Sequence[str], *, progress: bool = True) -> list[list[Answer]]:
        """[M][E]: every model's answer to every question."""
        bar = tqdm(list(questions), unit="q", disable=not progress)
        return [[model.answer(question) for model in self.models] for question in bar]

    def judged(
        self, questions: Sequence[str], golds: Sequence[str], judge: Judge, *, progress: bool = True
    ) -> tuple[Judged, dict[str, float]]:
        """(what routers are trained on, {model: mean cost per answer}) from all models' answers to all questions."""
        answers = self.answer_all(questions, progress=progress)
        right: Tensor = judged(judge, questions, [[answer.text for answer in row] for row in answers], golds)
        costs = torch.tensor(
            [[answer.cost for answer in row] for row in answers], dtype=torch.float32, device="cpu"
        ).mean(0)
        table = Judged(tuple(questions), right.float(), self.names)
        return table, dict(zip(self.names, costs.tolist(), strict=True))
