"""Answers of a serving engine that holds the routed model, in place of a patched model: `moerge eval --engine`.

One engine answers for all runs whose methods it can hold at once: every request says by which it is routed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..methods import get_method
from ..methods.base import HIDDEN_STATES, Method
from ..methods.fixed import PREFIX
from ..models.prompt import Prompt
from .answers import Answerer
from .asked_routers import router_of
from .runs import BASE, Run
from .whole_model import content

GIVEN = "given"
READS_BASE = (HIDDEN_STATES, "likelihood", "few-shot")  # routers that compute with the base in torch
# of a generation config, what changes greedy answers and an engine would not do
UNKNOWN_RULES = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "bad_words_ids", "min_length",
    "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
    "sequence_bias", "exponential_decay_length_penalty", "stop_strings", "watermarking_config",
)  # fmt: skip


class Engine(Protocol):
    """What answers; `serving.vllm.offline.Offline` is one. Prompts and answers are token ids."""

    def start(self) -> None:
        """Before questions."""

    def close(self) -> None:
        """Gives back what it takes."""

    def write(
        self, prompts: list[list[int]], routing: list[Any], limit: int, ends: Sequence[int], repetition_penalty: float
    ) -> list[list[int]]:
        """The greedy answers to N prompts, with their ends."""

    def log_probs(self, prompts: list[list[int]], answers: list[list[int]], routing: list[Any]) -> list[list[float]]:
        """log p(token | prompt, tokens before) of every token of the answers."""


@dataclass
class Group:
    """Runs that one engine answers. methods: {name: options}, what it is started with, its default first."""

    methods: dict[str, dict[str, Any]]
    runs: list[Run]

    @property
    def default(self) -> str:
        return next(iter(self.methods))


def groups_of(runs: Sequence[Run], routers: Mapping[str, Any] | None) -> list[Group]:
    """The runs in their order, shared out so that no engine has one method with two sets of options."""
    groups: list[Group] = []
    for run in runs:
        name, options = run.method, options_of(run, routers)
        alone = name is None or name.startswith(PREFIX)  # a request can say that of any engine
        group = groups[-1] if groups else None
        if group is None or (not alone and group.methods.get(name, options) != options):
            groups.append(group := Group({}, []))
        group.runs.append(run)
        if not alone:
            group.methods[name] = options
    for group in groups:
        one_by_one = any(run.method is not None and run.method.startswith(PREFIX) for run in group.runs)
        if not group.methods or (one_by_one and all(get_method(name).routing is None for name in group.methods)):
            group.methods[GIVEN] = {}
    return groups


def options_of(run: Run, routers: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a run's method that an engine is started with: the router's own settings are among them."""
    if (router := None if run.method is None else router_of(run, routers)) is None:
        return run.options
    kept = get_method(run.method).configure(**run.options)[2]
    settled = router.settings(run.method, kept)
    return run.options | {name: value for name, value in settled.items() if value != kept.get(name)}


def refused(runs: Sequence[Run]) -> list[str]:
    """Why an engine cannot answer for runs, of each by name."""
    problems = []
    for run in runs:
        method = None if run.method is None else get_method(run.method)
        if run.apart:
            why = "others than the base answer it"
        elif method is None:
            continue
        elif method.learned is not None:
            why = "its trained router is no option of what an engine computes"
        elif method.per_task and "queries" in method.options:
            why = "it pools the queries of a task, an engine sees one request"
        elif method.router in READS_BASE:
            why = "its router computes with the base model, which the engine has"
        else:
            continue
        problems.append(f"{run.label}: {why}")
    return problems


def rules_problems(config: Any) -> list[str]:
    """What a model's generation config asks of greedy answers that an engine would not do."""
    return [
        f"the model's generation config sets {name}={value!r}"
        for name in UNKNOWN_RULES
        if (value := getattr(config, name, None)) not in (None, 0, [], 1.0)
    ]


@dataclass(frozen=True)
class Holder:
    """One engine with what its answers depend on. names: the experts; facts: of the engine, beside the base's files."""

    engine: Engine
    folder: Path
    names: tuple[str, ...]
    about: Mapping[str, Any]

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        return {"model": {"files": content(self.folder)}, "engine": dict(self.about)}


class EngineAnswerer(Answerer):
    """Who answers a run for `evaluate(answerers=...)`.

    model: of the base, may be without weights; the engine of `holder` answers as `group` says, and is let go of after
    the group's last run. ValueError for a prompt with its answer that does not fit.
    """

    room = 1  # an engine writes a token when it is asked for log-likelihoods

    def __init__(self, holder: Holder, group: Group, run: Run, model: nn.Module, tokenizer: Any, router: Any):
        super().__init__(model, tokenizer)
        self._holder, self._engine, self._run, self._router = holder, holder.engine, run, router
        self._group, self._last = group, run is group.runs[-1]
        self._affinities: Tensor | None = None
        penalty = getattr(getattr(model, "generation_config", None), "repetition_penalty", None)
        self._penalty = 1.0 if penalty is None else float(penalty)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._holder.facts

    @contextmanager
    def ready(self) -> Iterator[Asked | None]:
        """A block in which it answers, with what stands for the handle of a patched model; None for the base."""
        try:
            yield None if self._run.method is None else Asked(self, self._run, self._router)
        finally:
            if self._last:
                self._engine.close()

    def texts(self, prompts: Sequence[str | Prompt], max_new_tokens: int, **options: Any) -> list[str]:
        if options:
            raise ValueError(f"an engine answers greedily, got {', '.join(options)}")
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        self.check_length(max(map(len, rows)) + max_new_tokens)
        self._engine.start()
        with self._measured():
            written = self._engine.write(rows, self._routing(len(rows)), max_new_tokens, self.ends, self._penalty)
        if self.meter is not None:
            count = sum(map(len, written))
            self.meter.add(sum(map(len, rows)) + count - len(rows), count)
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)

    def token_log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        starts = [self.prompt_ids(prompt) for prompt in prompts]
        ends = [self.target_ids(answer, prompt) for prompt, answer in zip(prompts, answers, strict=True)]
        lengths = [len(start) + len(end) for start, end in zip(starts, ends, strict=True)]
        self.check_length(max(lengths) + self.room)
        self._engine.start()
        with self._measured():
            found = self._engine.log_probs(starts, ends, self._routing(len(starts)))
        if self.meter is not None:
            self.meter.add(sum(lengths), len(starts))
        values = [torch.tensor(row, dtype=torch.float64, device="cpu") for row in found]
        real = [torch.ones(len(row), dtype=torch.bool, device="cpu") for row in found]
        pad = nn.utils.rnn.pad_sequence
        return pad(values, batch_first=True), pad(real, batch_first=True)

    def _routing(self, count: int) -> list[dict[str, Any] | None]:
        """What each of N requests says."""
        name = self._run.method
        if not self._holder.names:
            return [None] * count
        if self._run.label == BASE:
            said: dict[str, Any] | None = {"routing": False}
        elif name.startswith(PREFIX):
            said = {"expert": name.removeprefix(PREFIX)}
        else:
            said = None if name == self._group.default else {"method": name}
        if self._affinities is None:
            return [said] * count
        rows = self._affinities.expand(count, -1).tolist()
        return [{"method": name, "affinities": row} for row in rows]


class Asked:
    """What `evaluate` knows of a run that an engine answers: what it asks of a handle."""

    def __init__(self, answerer: EngineAnswerer, run: Run, router: Any):
        self.method: Method = get_method(run.method)
        self.options = self.method.configure(**run.options)[2]
        self.router, self._answerer = router, answerer

    @contextmanager
    def affinities(self, scores: Tensor) -> Iterator[None]:
        """A block whose requests all have these affinities [E]."""
        self._answerer._affinities = torch.as_tensor(scores, dtype=torch.float32, device="cpu").reshape(1, -1)
        try:
            yield
        finally:
            self._answerer._affinities = None

    @contextmanager
    def queries(self, texts: Sequence[str], *, tokenizer: Any = None) -> Iterator[None]:
        """A block whose requests are routed by these texts, one each."""
        settings = self.router.settings(self.method.name, self.options)
        self._answerer._affinities = self.router.scores(list(texts), settings).float()
        try:
            yield
        finally:
            self._answerer._affinities = None
