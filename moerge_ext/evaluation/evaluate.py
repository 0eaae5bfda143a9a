"""Every run on every task: batched, resumable, one score with its interval each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..experts.bank import ExpertBank
from ..experts.prompt_notes import warn_of_other_prompts
from ..files.listing import at_rows
from ..methods import get_method
from ..models.prompt import INPUT, PromptFormat
from ..routing.patch import Handle, check_patch, patch
from . import identity
from .answers import Answerer
from .asked_routers import (
    check_examples,
    check_routers,
    check_texts,
    files_read,
    router_of,
    row_queries,
    show_similar,
    task_queries,
)
from .checks import check_prompts, token_limit
from .cost import Meter, cost_of, since
from .finite import NoNumbers, check_values
from .metrics import GRADED, SCORES
from .runs import Run
from .scores import Score
from .store import Answers, alone_in
from .tasks import Task, check_distinct


@dataclass(frozen=True)
class Settings:
    """How the model is asked.

    template, chat: of `PromptFormat`; batch_size in items; max_new_tokens: None takes the longest target of the task
    plus its end; length_norm: rank classification by the mean log-likelihood per token (PHATGOOSE's code) or, when
    False, by the sum (T0); similar: solved examples, most similar to the query, that a QueryRouter's writer sees with
    it, from the task's train.jsonl (GLIDER: 3; 0 leaves it at the router's own, and at the zero-shot variant if it has
    none).
    """

    template: str = INPUT
    batch_size: int = 16
    max_new_tokens: int | None = None
    length_norm: bool = True
    seed: int = 0
    similar: int = 0
    chat: bool = False
    shares: bool = False

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
    answerers: Mapping[str, Answerer] | None = None,
    output: Path | None = None,
    progress: bool = True,
) -> list[Score]:
    """Scores of every run on every task, runs outermost.

    Args:
        runs: from `parse_run`; all of them are checked against the model before the first answer, and so is whether
            every prompt of every task can be made and fits the model's context.
        routers: {"instruction": QueryRouter, ...} for the runs that route by the query's text.
        answerers: {label: who answers} of the runs that are `apart`, and of others that no patched `model` shall answer
            (it may be one without weights then), with `facts` that the answers depend on.
        output: folder of the answers, `<output>/answers/<task>/<run>.<digest>.jsonl`. What is there of the same model,
            experts, tokenizer and settings, by content, is not computed again. One evaluation at a time.
    """
    settings = settings or Settings()
    if not runs or not tasks:
        raise ValueError(f"expected at least one method and one task, got {len(runs)} and {len(tasks)}")
    check_distinct(tasks)
    answerers = answerers or {}
    check_runs(model, experts, [run for run in runs if run.label not in answerers], routers)
    check_routers(runs, routers)
    if unknown := ", ".join(sorted({run.label for run in runs if run.apart} - set(answerers))):
        raise ValueError(f"runs of others than the base need answerers={{label: ...}}: there is none for {unknown}")
    answerer = Answerer(model, tokenizer)
    wider = max((answerer, *answerers.values()), key=lambda who: who.room)
    check_prompts(wider, tasks, settings.format, settings.max_new_tokens)
    check_examples(runs, routers, tasks, settings)
    check_texts(runs, routers, tasks, settings)
    warn_of_other_prompts(experts, [settings.format.seen_in(task.rows) for task in tasks])
    scores = []
    total = len(runs) * sum(len(task.rows) for task in tasks)
    with alone_in(output):
        stored = _stored(model, tokenizer, experts, runs, tasks, settings, routers, answerers, output)
        with tqdm(total=total, unit="item", disable=not progress) as bar:
            for run in runs:
                asked = answerers.get(run.label, answerer)
                ready = asked.ready() if run.label in answerers else patched(model, experts, run, routers)
                with ready as handle:
                    for task in tasks:
                        mine = stored[run.label, task.name]
                        bar.set_description(f"{run.label}: {task.name}")
                        bar.update(len(mine.items))
                        show_similar(getattr(handle, "router", None), task, settings)
                        name = label(run, handle)
                        _complete(mine, name, asked, handle, task, settings, bar)
                        scores.append(_score(name, task, mine))
    return scores


def _stored(
    model: nn.Module,
    tokenizer: Any,
    experts: ExpertBank,
    runs: Sequence[Run],
    tasks: Sequence[Task],
    settings: Settings,
    routers: Mapping[str, Any] | None,
    answerers: Mapping[str, Answerer],
    output: Path | None,
) -> dict[tuple[str, str], Answers]:
    """What is there of every run on every task, {(label, task): answers}. One ValueError for all that is damaged."""
    content = identity.of_model(model, tokenizer) if output is not None else {}
    digests = identity.of_experts(experts, experts.names) if output is not None else {}
    found, problems = {}, []
    for run in runs:
        router = None if run.method is None else router_of(run, routers)
        used = {name: digests[name] for name in identity.used_experts(run.method, experts) if digests}
        for task in tasks:
            show_similar(router, task, settings)
            depends = {**_header(run, task, settings, router), **content, "experts": used}
            depends |= answerers[run.label].facts if run.label in answerers else {}
            folder = output / "answers" / task.name if output is not None else None
            try:
                found[run.label, task.name] = Answers(folder, run.label, depends)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return found


def check_runs(model: nn.Module, experts: ExpertBank, runs: Sequence[Run], routers: Mapping[str, Any] | None) -> None:
    """ValueError for the first run that cannot patch the model or lacks a router; nothing is patched or built."""
    for run in runs:
        if run.method is not None and not run.apart:
            check_patch(model, experts, run.method, **run.options, **run.placing)
    check_routers(runs, routers)


def label(run: Run, handle: Handle | None) -> str:
    """The row's name in the table, with the variant of the router it was run with."""
    return _label(run, getattr(handle, "router", None))


def _label(run: Run, router: Any) -> str:
    variant = getattr(router, "variant", None)
    return f"{run.label} ({variant})" if variant else run.label


def patched(model: nn.Module, experts: ExpertBank, run: Run, routers: Mapping[str, Any] | None):
    """A context with the run's handle, None for the base and for who patches the model for himself."""
    if run.method is None or run.apart:
        return nullcontext()
    handle = patch(model, experts, run.method, **run.options, **run.placing)
    handle.router = router_of(run, routers)
    return handle


def _header(run: Run, task: Task, settings: Settings, router: Any) -> dict[str, Any]:
    """What the answers of a run depend on besides model, tokenizer and experts."""
    header = {
        "run": _label(run, router),
        "task": task.name,
        "metric": task.metric,
        "rows": task.digest,
        "template": settings.template,
        "chat": settings.chat,
        "max_new_tokens": settings.max_new_tokens,
    }
    if task.metric == "rank":
        header |= {"length_norm": settings.length_norm, "choices": task.closed}
    if (trained := run.options.get("routers")) is not None:
        header["routers"] = identity.of_trained(trained)
    if run.placing:
        header["placing"] = run.placing
    if shared(run, settings):
        header["shares"] = True
    if router is not None:
        method = get_method(run.method)
        options = router.settings(run.method, method.configure(**run.options)[2])
        header |= {"options": {key: str(value) for key, value in options.items()}, "similar": settings.similar}
        header["router"] = identity.of_router(router)
        header |= {"seed": settings.seed} if method.per_task else {}
        header |= files_read(run, router, task, settings)
        header |= {part: getattr(getattr(router, part, None), "name", None) for part in ("embedder", "writer")}
    return header


def shared(run: Run, settings: Settings) -> bool:
    """Whether the shares of the experts are kept: where they are asked for and the method routes."""
    return settings.shares and run.method is not None and get_method(run.method).routes


def _complete(
    stored: Answers, name: str, answerer: Answerer, handle: Handle | None, task: Task, settings: Settings, bar
) -> None:
    """Ask for the answers that are not there yet, and keep them with what they cost; ValueError for NaN."""
    todo = len(task.rows) - len(stored.items)
    settings = replace(settings, batch_size=1) if todo and answerer.alone else settings
    limit = token_limit(answerer, task, settings.max_new_tokens) if todo else None
    ask = partial(_ranked if task.metric == "rank" else _generated, answerer, handle, task)
    with Meter(answerer.model, getattr(handle, "router", None)) as meter:
        answerer.meter, begun = meter, meter.read()
        try:
            with task_queries(handle, task, settings) if todo else nullcontext():
                # what decides for the whole task is paid by all of its answers alike
                whole = since(begun, meter.read(), todo)
                while len(stored.items) < len(task.rows):
                    start = len(stored.items)
                    rows = task.rows[start : start + settings.batch_size]
                    before = meter.read()
                    try:
                        items = ask(rows, settings, limit)
                    except NoNumbers as error:
                        where = at_rows([start + error.row % len(rows)])
                        raise ValueError(f"{name}, task {task.name}, {where}: {error}") from error
                    each = since(before, meter.read(), len(rows))
                    cost = {part: round(value + whole[part], 6) for part, value in each.items()}
                    stored.add([{**item, "cost": cost} for item in items])
                    bar.update(len(items))
        finally:
            answerer.meter = None
    stored.finish()


def _generated(
    answerer: Answerer, handle: Handle | None, task: Task, rows: Sequence[dict], settings: Settings, limit: int
) -> list[dict[str, Any]]:
    prompts = answerer.prompts(rows, settings.format)
    with row_queries(handle, rows, answerer.tokenizer), recorded(answerer, handle, len(rows), settings) as shares:
        answers = answerer.generate(prompts, limit)
    right = SCORES[task.metric]
    scores = [right(answer, row["target"]) for answer, row in zip(answers, rows, strict=True)]
    scores = [round(score, 6) if task.metric in GRADED else score for score in scores]
    kept = [_kept(row, prompt.text) for row, prompt in zip(rows, prompts, strict=True)]
    return [
        {**item, "answer": answer, "right": score, **parts}
        for item, answer, score, parts in zip(kept, answers, scores, shares(), strict=True)
    ]


def _ranked(
    answerer: Answerer, handle: Handle | None, task: Task, rows: Sequence[dict], settings: Settings, _limit: None
) -> list[dict[str, Any]]:
    """Each row's choices side by side, `batch_size` sequences at a time. NoNumbers names the row."""
    flat = [(row, choice) for row in rows for choice in task.choices_of(row)]
    of = [number for number, row in enumerate(rows) for _ in task.choices_of(row)]
    values, shares = [], []
    for start in range(0, len(flat), settings.batch_size):
        part = flat[start : start + settings.batch_size]
        with (
            row_queries(handle, [row for row, _ in part], answerer.tokenizer),
            recorded(answerer, handle, len(part), settings) as parts,
        ):
            prompts = answerer.prompts([row for row, _ in part], settings.format)
            choices = [choice for _, choice in part]
            found = answerer.log_likelihoods(prompts, choices, length_norm=settings.length_norm).tolist()
        try:
            check_values(found, choices)
        except NoNumbers as error:
            error.row = of[start + error.row]
            raise
        values += found
        shares += parts()
    items, values, shares = [], iter(values), iter(shares)
    for row in rows:
        scores = {choice: (next(values), next(shares)) for choice in task.choices_of(row)}
        best = max(scores, key=lambda choice: scores[choice][0])
        item = _kept(row, answerer.prompts([row], settings.format)[0].text)
        item |= {"answer": best, "right": best == row["target"], **scores[best][1]}
        items.append({**item, "log_likelihoods": {choice: value for choice, (value, _) in scores.items()}})
    return items


def _kept(row: dict, prompt: str) -> dict[str, str]:
    """What an answer's row says of its question: the prompt as the model got it where that is not the input itself."""
    return {"input": row["input"], **({} if prompt == row["input"] else {"prompt": prompt}), "target": row["target"]}


@contextmanager
def recorded(
    answerer: Answerer, handle: Handle | None, count: int, settings: Settings
) -> Iterator[Callable[[], list[dict]]]:
    """A block for `count` sequences; what it gives says {"shares": {expert: part}} of each, {} where none is kept."""
    if handle is None or not handle.method.routes or not settings.shares:
        yield lambda: [{}] * count
        return
    with handle.record(rows=count) as trace:
        answerer.trace = trace
        try:
            yield lambda: [
                {"shares": {name: round(part, 4) for name, part in zip(trace.names, row, strict=True)}}
                for row in trace.row_share().tolist()
            ]
        finally:
            answerer.trace = None


def _score(name: str, task: Task, stored: Answers) -> Score:
    items = tuple(item["right"] for item in stored.items)
    values = (name, task.name, task.part, task.metric, len(items), sum(items), task.chance, items)
    return Score(*values, reused=stored.reused, cost=cost_of(stored.items))
