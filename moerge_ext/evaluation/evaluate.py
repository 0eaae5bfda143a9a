"""Every run on every task: batched, resumable, one score with its interval each."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.prompt_notes import warn_of_other_prompts
from ..methods import get_method
from ..methods.fixed import PREFIX
from ..models.prompt import INPUT, PromptFormat
from ..queries.describe import draw
from ..queries.router import QueryRouter, similar_examples
from ..routing.patch import Handle, check_patch, patch
from . import identity
from .answers import Answerer
from .checks import check_prompts, token_limit
from .metrics import accuracy, exact_match, wilson
from .runs import Run
from .store import Answers, alone_in
from .tasks import Task


@dataclass(frozen=True)
class Score:
    """`right` of `n` items; interval: the 95 % Wilson interval of the share; chance: of a guess, None if not known.

    reused: how many of the answers were stored before.
    """

    method: str
    task: str
    part: str
    metric: str
    n: int
    right: int
    chance: float | None
    items: tuple[bool, ...]
    reused: int = field(default=0, compare=False)

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Settings:
    """How the model is asked.

    template, chat: of `PromptFormat`; batch_size in items; max_new_tokens: None takes the longest target of the task
    plus its end; length_norm: rank classification by the mean log-likelihood per token (PHATGOOSE's code) or, when
    False, by the sum (T0); similar: solved examples, most similar to the query, that a QueryRouter's writer sees with
    it, from the task's train.jsonl (GLIDER: 3; 0 is the zero-shot variant).
    """

    template: str = INPUT
    batch_size: int = 16
    max_new_tokens: int | None = None
    length_norm: bool = True
    seed: int = 0
    similar: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        self.format  # noqa: B018 (refuses a template without a field)
        for name in ("batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.similar < 0:
            raise ValueError(f"similar must not be negative, got {self.similar}")

    @property
    def format(self) -> PromptFormat:
        return PromptFormat(self.template, self.chat)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    experts: ExpertBank,
    runs: Sequence[Run],
    tasks: Sequence[Task],
    settings: Settings | None = None,
    *,
    routers: Mapping[str, Any] | None = None,
    output: Path | None = None,
    progress: bool = True,
) -> list[Score]:
    """Scores of every run on every task, runs outermost.

    Args:
        runs: from `parse_run`; all of them are checked against the model before the first answer, and so is whether
            every prompt of every task can be made and fits the model's context.
        routers: {"instruction": QueryRouter, ...} for the runs that route by the query's text.
        output: folder of the answers, `<output>/answers/<task>/<run>.<digest>.jsonl`. What is there of the same model,
            experts, tokenizer and settings, by content, is not computed again. One evaluation at a time.
    """
    settings = settings or Settings()
    if not runs or not tasks:
        raise ValueError(f"expected at least one method and one task, got {len(runs)} and {len(tasks)}")
    twice = {task.name for task in tasks if [other.name for other in tasks].count(task.name) > 1}
    if twice:
        raise ValueError(f"tasks must have distinct names; several are called {', '.join(sorted(twice))}")
    check_runs(model, experts, runs, routers)
    answerer = Answerer(model, tokenizer)
    check_prompts(answerer, tasks, settings.format, settings.max_new_tokens)
    warn_of_other_prompts(experts, [settings.format.seen_in(task.rows) for task in tasks])
    scores = []
    total = len(runs) * sum(len(task.rows) for task in tasks)
    content = identity.of_model(model, tokenizer) if output is not None else {}
    digests = identity.of_experts(experts, experts.names) if output is not None else {}
    with alone_in(output), tqdm(total=total, unit="item", disable=not progress) as bar:
        for run in runs:
            with patched(model, experts, run, routers) as handle:
                for task in tasks:
                    bar.set_description(f"{run.label}: {task.name}")
                    show_similar(handle, task, settings)
                    used = {name: digests[name] for name in identity.used_experts(run.method, experts) if digests}
                    depends = {**_header(run, task, settings, handle), **content, "experts": used}
                    folder = output / "answers" / task.name if output is not None else None
                    stored = Answers(folder, run.label, depends)
                    bar.update(len(stored.items))
                    _complete(stored, answerer, handle, task, settings, bar)
                    scores.append(_score(label(run, handle), task, stored))
    return scores


def check_runs(model: nn.Module, experts: ExpertBank, runs: Sequence[Run], routers: Mapping[str, Any] | None) -> None:
    """ValueError for the first run that cannot patch the model or lacks a router; nothing is patched or built."""
    for run in runs:
        if run.method is not None:
            check_patch(model, experts, run.method, **run.options)
            router_of(run, routers)


def label(run: Run, handle: Handle | None) -> str:
    """The row's name in the table, with the variant of the router it was run with."""
    variant = getattr(getattr(handle, "router", None), "variant", None)
    return f"{run.label} ({variant})" if variant else run.label


def patched(model: nn.Module, experts: ExpertBank, run: Run, routers: Mapping[str, Any] | None):
    """A context with the run's handle, None for the base."""
    if run.method is None:
        return nullcontext()
    handle = patch(model, experts, run.method, **run.options)
    handle.router = router_of(run, routers)
    return handle


def router_of(run: Run, routers: Mapping[str, Any] | None) -> Any:
    """The router of a run, None for a method that has none; ValueError for one that is missing or lacks a setting."""
    method = get_method(run.method)
    if method.bias is None:
        return None
    router = (routers or {}).get(method.router)
    if router is None:
        raise ValueError(f"method '{run.label}' routes by more than the tokens: it needs a router by {method.router}")
    router.settings(run.method, method.configure(**run.options)[2])
    return router


def _header(run: Run, task: Task, settings: Settings, handle: Handle | None) -> dict[str, Any]:
    header = {
        "run": label(run, handle),
        "task": task.name,
        "metric": task.metric,
        "rows": task.digest,
        "template": settings.template,
        "chat": settings.chat,
        "max_new_tokens": settings.max_new_tokens,
    }
    if task.metric == "rank":
        header["length_norm"] = settings.length_norm
    if (trained := run.options.get("routers")) is not None:
        header["routers"] = identity.of_trained(trained)
    router = getattr(handle, "router", None)
    if router is not None:
        options = router.settings(run.method, handle.options)
        header |= {"options": {key: str(value) for key, value in options.items()}, "similar": settings.similar}
        header["router"] = identity.of_router(router)
        header |= {"seed": settings.seed} if handle.method.per_task else {}
        header |= {part: getattr(getattr(router, part, None), "name", None) for part in ("embedder", "writer")}
    return header


def _complete(stored: Answers, answerer: Answerer, handle: Handle | None, task: Task, settings: Settings, bar) -> None:
    if len(stored.items) == len(task.rows):
        return
    limit = token_limit(answerer, task, settings.max_new_tokens)
    with task_queries(handle, task, settings):
        while len(stored.items) < len(task.rows):
            start = len(stored.items)
            rows = task.rows[start : start + settings.batch_size]
            if task.metric == "rank":
                items = _ranked(answerer, handle, task, rows, settings)
            else:
                items = _generated(answerer, handle, task, rows, settings, limit)
            stored.add(items)
            bar.update(len(items))


def _generated(answerer, handle, task: Task, rows: Sequence[dict], settings: Settings, limit: int) -> list[dict]:
    right = exact_match if task.metric == "exact_match" else accuracy
    with row_queries(handle, rows, answerer.tokenizer):
        answers = answerer.generate([settings.format.prompt(row, answerer.tokenizer) for row in rows], limit)
    return [{"answer": a, "right": right(a, row["target"])} for a, row in zip(answers, rows, strict=True)]


def _ranked(answerer, handle, task: Task, rows: Sequence[dict], settings: Settings) -> list[dict[str, Any]]:
    """Each row's choices side by side, `batch_size` sequences at a time."""
    flat = [(row, choice) for row in rows for choice in task.choices_of(row)]
    values = []
    for start in range(0, len(flat), settings.batch_size):
        part = flat[start : start + settings.batch_size]
        with row_queries(handle, [row for row, _ in part], answerer.tokenizer):
            prompts = [settings.format.prompt(row, answerer.tokenizer) for row, _ in part]
            choices = [choice for _, choice in part]
            values += answerer.log_likelihoods(prompts, choices, length_norm=settings.length_norm).tolist()
    items, values = [], iter(values)
    for row in rows:
        scores = {choice: next(values) for choice in task.choices_of(row)}
        best = max(scores, key=scores.get)
        items.append({"answer": best, "right": best == row["target"]})
    return items


def show_similar(handle: Handle | None, task: Task, settings: Settings) -> None:
    """Let the run's QueryRouter write from solved examples of the task as well, when the settings ask for it."""
    router = getattr(handle, "router", None)
    if settings.similar and isinstance(router, QueryRouter) and router.writer is not None:
        router.similar = similar_examples(router.embedder, task.examples(), settings.similar)


def task_queries(handle: Handle | None, task: Task, settings: Settings):
    """A context in which a router that decides for a whole task has done so; nothing for the other methods.

    By examples: from `queries` (an option) random inputs of the evaluated file; else from solved rows of train.jsonl.
    """
    router = getattr(handle, "router", None)
    if router is None or not handle.method.per_task:
        return nullcontext()
    if router.source == "examples":
        inputs = task.inputs()
        return handle.queries(random.Random(settings.seed).sample(inputs, min(handle.options["queries"], len(inputs))))
    examples = draw(task.examples(), router.task_examples, settings.seed)
    return handle.affinities(router.task_affinities(examples, handle))


def row_queries(handle: Handle | None, rows: Sequence[dict], tokenizer: Any):
    """A context in which a router that decides for every query has seen the rows; nothing for the other methods."""
    router = getattr(handle, "router", None)
    if router is None or handle.method.per_task:
        return nullcontext()
    return handle.queries([row["input"] for row in rows], tokenizer=tokenizer)


def _score(name: str, task: Task, stored: Answers) -> Score:
    items = tuple(bool(item["right"]) for item in stored.items)
    return Score(name, task.name, task.part, task.metric, len(items), sum(items), task.chance, items, stored.reused)


def derive(scores: Sequence[Score], baselines: Sequence[str]) -> list[Score]:
    """The scores of `oracle_dataset` and `best_individual`, from those of every `expert:<name>`."""
    tasks = list(dict.fromkeys(score.task for score in scores))
    by_expert: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.method.startswith(PREFIX):
            by_expert.setdefault(score.method, {})[score.task] = score
    made = []
    for name in baselines:
        if name == "oracle_dataset":
            best = [max((s[task] for s in by_expert.values()), key=lambda s: s.value) for task in tasks]
        else:
            means = {e: sum(s.value for s in rows.values()) / len(rows) for e, rows in by_expert.items()}
            best = list(by_expert[max(means, key=means.get)].values())
        made += [replace(score, method=name) for score in best]
    return made
