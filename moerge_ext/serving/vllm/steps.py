"""Which request each token of a step is of: what a worker's model runner says, written into the tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from ...files.listing import listed
from ..requests import Choice
from ..settings import KEY
from ..tables import Tables
from ..traces import Traces
from ..watching import Watcher
from .overflow import Overflow

logger = logging.getLogger("vllm.moerge_ext")  # vLLM's handlers print it
TRACED = "_" + KEY + "_trace"  # the extra argument with the name under which a request's trace is kept
CHECKED = "_" + KEY  # the extra argument that the front end makes of a request's own


class Steps:
    """Follows the requests of one model runner, whose layers with experts compute by `methods` (`RoutedMethod`)."""

    def __init__(
        self,
        tables: Tables,
        methods: Sequence[Any] = (),
        watcher: Watcher | None = None,
        *,
        overflow: Overflow | None = None,
        sometimes: bool = False,
    ):
        """sometimes: whether the model may leave layers out of a step, as those that look at images."""
        self.tables, self.watcher, self.overflow, self._sometimes = tables, watcher, overflow, sometimes
        self._watched = list(methods)  # until the first step has shown which of them the model uses
        self._total, self._stepped = len(self._watched), False
        self.choices: dict[str, Choice] = {}  # {request: what it asks for}, of those that ask for something

    def watch(self, runner: Any) -> None:
        """Sees every step of `runner`, of vLLM's first kind or second; RuntimeError for one of a kind unknown here."""
        names = [name for name in ("_prepare_inputs", "prepare_inputs") if callable(getattr(runner, name, None))]
        if len(names) != 1 or not callable(getattr(runner, "execute_model", None)):
            raise RuntimeError(f"moerge: {type(runner).__name__} is no model runner that this version of moerge knows")
        execute = _before(self.note, runner.execute_model)
        runner.execute_model = lambda *args, **kwargs: self._seen(execute(*args, **kwargs))
        if names[0] == "_prepare_inputs":
            runner._prepare_inputs = _before(
                lambda scheduled, lengths: self.begin(runner.input_batch.req_ids[: len(lengths)], lengths),
                runner._prepare_inputs,
            )
        else:
            runner.prepare_inputs = _before(
                lambda scheduled, state, *rest: self.begin(state.req_ids, state.num_scheduled_tokens),
                runner.prepare_inputs,
            )

    def note(self, scheduled: Any, *rest: Any) -> None:
        """Requests that go and come: a name may do both in one step. Those put aside lost their blocks too."""
        gone = {*scheduled.finished_req_ids, *(getattr(scheduled, "preempted_req_ids", None) or ())}
        if gone and self.overflow is not None:
            self.overflow.clear(any(name in gone and one.weights is not None for name, one in self.choices.items()))
        for name in scheduled.finished_req_ids:
            self.choices.pop(name, None)
        for request in scheduled.scheduled_new_reqs:
            params = request.sampling_params
            said = None if params is None or not params.extra_args else params.extra_args.get(CHECKED)
            if said is None:
                self.choices.pop(request.req_id, None)
            else:
                self.choices[request.req_id] = Choice(**said)
            if self.traces is not None and (key := (params.extra_args or {}).get(TRACED) if params else None):
                self.traces.open(request.req_id, key, len(request.prompt_token_ids or ()))
        if self.traces is not None:
            known = scheduled.scheduled_cached_reqs
            at = dict(zip(known.req_ids, known.num_computed_tokens, strict=True))
            self.traces.at(at | {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs})

    def _seen(self, result: Any) -> Any:
        """After a step: RuntimeError if the first one with tokens left out layers with experts, all or any that its
        model may not leave out."""
        self.tables.end()
        if self.watcher is not None:
            self.watcher.end()
        if self._watched and self._stepped:
            idle, self._watched = [method for method in self._watched if not method.ran], []
            names = listed([method.name for method in idle], "layer")
            if idle and (len(idle) == self._total or not self._sometimes):
                raise RuntimeError(f"moerge: the model answered without layers that have experts: {names}")
            if idle:
                logger.warning("moerge: layers with experts took no part in the first step: %s", names)
        return result

    def begin(self, requests: Sequence[str], lengths: Sequence[int]) -> None:
        self._stepped = True
        self.tables.begin([self.choices.get(name) for name in requests], lengths)
        if self.watcher is not None:
            self.watcher.begin(requests, lengths, self.choices)

    @property
    def traces(self) -> Traces | None:
        return None if self.watcher is None else self.watcher.traces


def _before(seen: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(scheduled: Any, *rest: Any, **options: Any) -> Any:
        seen(scheduled, *rest)
        return then(scheduled, *rest, **options)

    return both
