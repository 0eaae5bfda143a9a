"""An ensemble as a row of `moerge eval`, beside methods that route among LoRA experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..evaluation import identity
from ..evaluation.answers import Answerer
from ..evaluation.checks import token_limit
from ..evaluation.tasks import Task
from ..experts.bank import ExpertBank
from ..models.prompt import Prompt, PromptFormat
from ..routing.patch import patch
from .judge import final_answer
from .measure import check_lengths
from .mixture import PromptEnsemble


class EnsembleAnswerer(Answerer):
    """Who answers for `evaluate(answerers=...)`: the rows' texts are questions, which the ensemble's experts put.

    Args:
        ensemble: with its router, unless one `expert` alone is to answer.
        bank: the LoRA experts of its experts; the model is patched with them in `ready` alone. None when it has none.
        top_k: experts mixed per question; expert: the name of the one that answers instead.
        stop, answer_after, max_new_tokens: as in docs/ensemble.md; answers begin after `answer_after`.

    Choices are ranked by the likelihood that the mixture gives them.
    """

    def __init__(
        self,
        ensemble: PromptEnsemble,
        *,
        bank: ExpertBank | None = None,
        top_k: int = 2,
        expert: str | None = None,
        stop: Sequence[str] = (),
        answer_after: str | None = None,
        max_new_tokens: int | None = None,
    ):
        super().__init__(ensemble.asked.model, ensemble.asked.tokenizer)
        if expert is not None and expert not in ensemble.names:
            raise ValueError(f"no prompt expert named '{expert}'; there are: {', '.join(ensemble.names)}")
        if expert is None and ensemble.router is None:
            raise ValueError('an ensemble needs a router to answer: name it as "router" in its file, or one expert')
        if not 1 <= top_k <= len(ensemble.names):
            raise ValueError(f"top_k must be between 1 and the number of experts, {len(ensemble.names)}; got {top_k}")
        self.ensemble, self.bank, self.top_k, self.expert = ensemble, bank, top_k, expert
        self.stop, self.answer_after, self.max_new_tokens = tuple(stop), answer_after, max_new_tokens
        self._chosen: dict[str, tuple[Tensor, Tensor]] = {}

    @property
    def meter(self) -> Any:
        """The one who puts the experts' prompts to the model is measured."""
        return self.ensemble.asked.meter

    @meter.setter
    def meter(self, meter: Any) -> None:
        self.ensemble.asked.meter = meter

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the answers depend on besides the model and the task, by content."""
        ensemble = self.ensemble
        used = [e for e in ensemble.experts if self.expert in (None, e.name)]
        said = {
            "experts": {e.name: identity.of_text([dict(e.facts), e.lora]) for e in used},
            "loras": identity.of_experts(self.bank, {e.lora for e in used} - {None}) if self.bank is not None else {},
            "expert": self.expert,
            "stop": self.stop,
            "answer_after": self.answer_after,
            "max_new_tokens": self.max_new_tokens,
            "seed": ensemble.sampler.seed,
        }
        if self.expert is None:
            router = ensemble.router
            said |= {"top_k": self.top_k, "max_length": router.max_length}
            said["router"] = identity.of_tensors(router.model.named_parameters())
        return {"ensemble": said}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A block in which it answers: the model is patched with the experts' LoRAs, if they have any."""
        if self.bank is None:
            yield
            return
        with patch(self.model, self.bank, method="given", top_k=1) as handle:
            self.ensemble.handle = handle
            yield

    def check(self, tasks: Sequence[Task], form: PromptFormat, max_new_tokens: int | None) -> None:
        """ValueError for tasks with prompts that do not fit the context with their answers; needs no answer."""
        for task in tasks:
            limit = self.max_new_tokens or token_limit(self, task, max_new_tokens)
            if limit is None:  # choices
                limit = max(len(self.target_ids(choice)) for row in task.rows for choice in task.choices_of(row))
            try:
                check_lengths(self.ensemble, _texts(self.prompts(task.rows, form)), limit, only=self.expert)
            except ValueError as error:
                raise ValueError(f"task {task.name}: {error}") from error

    def prompts(self, rows: Sequence[Mapping[str, Any]], form: PromptFormat) -> list[Prompt]:
        """The questions; what the model is given, each expert makes of them."""
        return [Prompt(form.text(row)) for row in rows]

    def generate(self, prompts: Sequence[str | Prompt], max_new_tokens: int, **options: Any) -> list[str]:
        questions, limit = _texts(prompts), self.max_new_tokens or max_new_tokens
        select = self._select(questions)
        answers = self.ensemble.answer(questions, select=select, max_new_tokens=limit, stop=self.stop, **options)
        return [final_answer(answer, self.answer_after) for answer in answers]

    def log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str], *, length_norm: bool) -> Tensor:
        options = {"max_new_tokens": self.max_new_tokens} if self.max_new_tokens else {}
        questions = _texts(prompts)
        select = self._select(questions)
        return self.ensemble.log_likelihoods(
            questions, answers, select=select, length_norm=length_norm, stop=self.stop, **options
        )

    def _select(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        if self.expert is not None:
            ids = torch.full((len(questions), 1), self.ensemble.names.index(self.expert), device="cpu")
            return ids, torch.ones(len(questions), 1, dtype=torch.float32, device="cpu")
        todo = [question for question in dict.fromkeys(questions) if question not in self._chosen]
        if todo:
            self._chosen |= zip(todo, zip(*self.ensemble.router.select(todo, self.top_k), strict=True), strict=True)
        chosen = [self._chosen[question] for question in questions]
        return torch.stack([ids for ids, _ in chosen]), torch.stack([weights for _, weights in chosen])


def _texts(prompts: Sequence[str | Prompt]) -> list[str]:
    return [prompt if isinstance(prompt, str) else prompt.text for prompt in prompts]
