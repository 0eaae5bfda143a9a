"""Which request each token of a step is of: what a worker's model runner says, written into the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..requests import Choice
from ..settings import KEY
from ..tables import Tables

CHECKED = "_" + KEY  # the extra argument that the front end makes of a request's own


class Steps:
    """Follows the requests of one model runner."""

    def __init__(self, tables: Tables):
        self.tables = tables
        self.choices: dict[str, Choice] = {}  # {request: what it asks for}, of those that ask for something

    def watch(self, runner: Any) -> None:
        """Sees every step of `runner`, of vLLM's first kind or second; RuntimeError for one of a kind unknown here."""
        names = [name for name in ("_prepare_inputs", "prepare_inputs") if callable(getattr(runner, name, None))]
        if len(names) != 1 or not callable(getattr(runner, "execute_model", None)):
            raise RuntimeError(f"moerge: {type(runner).__name__} is no model runner that this version of moerge knows")
        runner.execute_model = _before(self.note, runner.execute_model)
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
        """Requests that come and go."""
        for request in scheduled.scheduled_new_reqs:
            params = request.sampling_params
            said = None if params is None or not params.extra_args else params.extra_args.get(CHECKED)
            if said is None:
                self.choices.pop(request.req_id, None)
            else:
                self.choices[request.req_id] = Choice(**said)
        for name in scheduled.finished_req_ids:
            self.choices.pop(name, None)

    def begin(self, requests: Sequence[str], lengths: Sequence[int]) -> None:
        self.tables.begin([self.choices.get(name) for name in requests], lengths)


def _before(seen: Callable[..., None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(scheduled: Any, *rest: Any, **options: Any) -> Any:
        seen(scheduled, *rest)
        return then(scheduled, *rest, **options)

    return both
