"""What the routers of runs see of tasks and their queries, and what they lack."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

from ..files.listing import at_rows
from ..methods import get_method
from ..queries.describe import draw
from ..queries.router import QueryRouter
from ..queries.similar import similar_examples
from ..routing.patch import Handle
from .runs import Run
from .tasks import Task, digest_of


def router_of(run: Run, routers: Mapping[str, Any] | None) -> Any:
    """The router of a run, None for a method that has none; ValueError for one that is missing or lacks a setting."""
    method = get_method(run.method)
    if method.bias is None:
        return None
    router = (routers or {}).get(method.router)
    if method.source is None:
        raise ValueError(
            f"method '{run.label}' takes weights from you: it is for Python, inside `with handle.affinities(weights):`"
        )
    if router is None:
        raise ValueError(f"method '{run.label}' routes by more than the tokens: it needs a router by {method.router}")
    router.settings(run.method, method.configure(**run.options)[2])
    return router


def check_routers(runs: Sequence[Run], routers: Mapping[str, Any] | None) -> None:
    """ValueError for the first run that lacks a router, or a setting of it; needs no model."""
    for run in runs:
        if run.method is not None:
            router_of(run, routers)


def check_examples(
    runs: Sequence[Run], routers: Mapping[str, Any] | None, tasks: Sequence[Task], settings: Any
) -> None:
    """One ValueError for all tasks that lack the solved rows of train.jsonl which a run will read."""
    needed: dict[str, int] = {}
    for run in runs:
        router = None if run.method is None else router_of(run, routers)
        if _sees_similar(router, settings):
            needed[run.label] = settings.similar
        elif router is not None and _reads_solved_rows(run.method):
            needed[run.label] = router.task_examples
    problems = []
    for task in tasks if needed else ():
        try:
            count = len(task.examples())
        except ValueError as error:
            problems.append(str(error))
            continue
        problems += [
            f"task {task.name}: method '{name}' reads {least} solved examples, and its train.jsonl has {count}"
            for name, least in needed.items()
            if count < least
        ]
    if problems:
        raise ValueError("\n".join(problems))


def check_texts(runs: Sequence[Run], routers: Mapping[str, Any] | None, tasks: Sequence[Task], settings: Any) -> None:
    """One ValueError for all tasks with a blank text that a run's embedder or writer will be given, and refuse."""
    problems: dict[str, list[str]] = {}
    for run in runs:
        router = None if run.method is None else router_of(run, routers)
        for task in tasks:
            for where, rows in _texts_read(run, router, task, settings).items():
                if blank := [number for number, text in enumerate(rows) if text is not None and not text.strip()]:
                    said = f"task {task.name}: {where}, {at_rows(blank)}: the input is blank"
                    problems.setdefault(said, []).append(run.label)
    if problems:
        lines = [f"{said}, and {', '.join(labels)} cannot route by it" for said, labels in problems.items()]
        raise ValueError(
            "a blank text has no meaning to route by: give it words, or leave its row out\n" + "\n".join(lines)
        )


def _texts_read(run: Run, router: Any, task: Task, settings: Any) -> dict[str, list[str | None]]:
    """{file: its inputs that a run's router embeds or has a writer read, None for others}."""
    writer, embedder = getattr(router, "writer", None), getattr(router, "embedder", None)
    if writer is None and embedder is None:
        return {}
    found: dict[str, list[str | None]] = {}
    if _pools_inputs(run.method):
        options = get_method(run.method).configure(**run.options)[2]
        drawn, inputs = set(_pooled(task, options, settings)), task.inputs()
        found[f"{task.split}.jsonl"] = [text if text in drawn else None for text in inputs]
    elif not get_method(run.method).per_task:
        found[f"{task.split}.jsonl"] = [row["input"] for row in task.rows]
    elif writer is None:
        examples = task.examples()
        drawn = [id(row) for row in draw(examples, router.task_examples, settings.seed)]
        found["train.jsonl"] = [row["input"] if id(row) in drawn else None for row in examples]
    if _sees_similar(router, settings):
        found["train.jsonl"] = [row["input"] for row in task.examples()]
    return found


def _pooled(task: Task, options: Mapping[str, Any], settings: Any) -> list[str]:
    """The random inputs of the evaluated file by which a method decides for the task."""
    inputs = task.inputs()
    return random.Random(settings.seed).sample(inputs, min(options["queries"], len(inputs)))


def files_read(run: Run, router: Any, task: Task, settings: Any) -> dict[str, str]:
    """Digests of what a run reads of a task's files beside its rows: of train.jsonl, of the whole evaluated file."""
    found = {}
    if _sees_similar(router, settings) or _reads_solved_rows(run.method):
        found["solved"] = digest_of(task.examples())
    if _pools_inputs(run.method):
        found["inputs"] = digest_of(task.inputs())
    return found


def _sees_similar(router: Any, settings: Any) -> bool:
    """Whether a router's writer sees solved rows of the task's train.jsonl with a query."""
    return bool(settings.similar) and isinstance(router, QueryRouter) and router.writer is not None


def _pools_inputs(name: str) -> bool:
    """Whether a method decides for a task by inputs of the evaluated file."""
    method = get_method(name)
    return method.per_task and "queries" in method.options


def _reads_solved_rows(name: str) -> bool:
    """Whether a method decides for a task by solved rows of its train.jsonl, not by inputs of the evaluated file."""
    method = get_method(name)
    return method.per_task and "queries" not in method.options


def show_similar(router: Any, task: Task, settings: Any) -> None:
    """Let a QueryRouter write from solved examples of the task as well, when the settings ask for it.

    They are embedded when the first query is.
    """
    if _sees_similar(router, settings):
        nearest = cache(lambda: similar_examples(router.embedder, task.examples(), settings.similar))
        router.similar = lambda query: nearest()(query)


def task_queries(handle: Handle | None, task: Task, settings: Any):
    """A context in which a router that decides for a whole task has done so; nothing for the other methods.

    With an option `queries`: from so many random inputs of the evaluated file; else from solved rows of train.jsonl.
    """
    router = getattr(handle, "router", None)
    if router is None or not handle.method.per_task:
        return nullcontext()
    if "queries" in handle.options:
        return handle.queries(_pooled(task, handle.options, settings))
    examples = draw(task.examples(), router.task_examples, settings.seed)
    return handle.affinities(router.task_affinities(examples, handle))


def row_queries(handle: Handle | None, rows: Sequence[dict], tokenizer: Any):
    """A context in which a router that decides for every query has seen the rows; nothing for the other methods."""
    router = getattr(handle, "router", None)
    if router is None or handle.method.per_task:
        return nullcontext()
    return handle.queries([row["input"] for row in rows], tokenizer=tokenizer)
