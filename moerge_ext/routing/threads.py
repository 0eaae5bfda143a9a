"""Threads that are begun inside of a handle's block belong to it, as asyncio's tasks do.

What a block sets is a context variable, which a new thread does not see (Python 3.14 can be told otherwise). But
`TextIteratorStreamer`, continuous batching, DataParallel and thread pools compute in threads of their own. So
`Thread.start` and `ThreadPoolExecutor.submit` are wrapped once, when the first block is entered: they carry that one
variable over, and nothing else. Outside of blocks they do what they did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import wraps
from typing import Any

# RoutingState -> Request, for the blocks that the running code is in; never changed in place. {None: None}: certainly
# in none
REQUESTS: ContextVar[Mapping[Any, Any]] = ContextVar("moerge_requests", default={})  # noqa: B039
_LOCK = threading.Lock()


def carry_into_threads() -> None:
    """From here on, what is begun inside of a block is inside of it."""
    with _LOCK:
        if not hasattr(threading.Thread.start, "carries_requests"):
            threading.Thread.start = _carrying_start(threading.Thread.start)
            ThreadPoolExecutor.submit = _carrying_submit(ThreadPoolExecutor.submit)


def is_foreign_thread() -> bool:
    """Whether Python did not begin the running thread, such as those in which autograd computes for GPUs."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def _carrying_start(begin: Callable) -> Callable:
    @wraps(begin)
    def start(thread: threading.Thread, *args: Any, **kwargs: Any) -> Any:
        if requests := REQUESTS.get():
            thread.run = inside(requests, thread.run)
        return begin(thread, *args, **kwargs)

    start.carries_requests = True
    return start


def _carrying_submit(hand_in: Callable) -> Callable:
    @wraps(hand_in)
    def submit(pool: ThreadPoolExecutor, function: Callable, /, *args: Any, **kwargs: Any) -> Any:
        requests = REQUESTS.get()
        if not requests:
            return hand_in(pool, function, *args, **kwargs)
        token = REQUESTS.set({})  # a thread that the pool begins here serves others too
        try:
            return hand_in(pool, inside(requests, function), *args, **kwargs)
        finally:
            REQUESTS.reset(token)

    return submit


def inside(requests: Mapping[Any, Any], function: Callable) -> Callable:
    """`function`, to be called elsewhere, inside of the blocks of `requests` and of the forward that runs here."""
    rows = [request.rows for state, request in requests.items() if state is not None and request.rows is not None]
    batches = [(of, of.batch) for of in rows]

    def run(*args: Any, **kwargs: Any) -> Any:
        states = [state for state in {**REQUESTS.get(), **requests} if state is not None]
        token = REQUESTS.set(requests)
        shown = [(state, state.show(requests.get(state))) for state in states]
        before = [(of, of.batch) for of in rows]
        _set_batches(batches)
        try:
            return function(*args, **kwargs)
        finally:
            _set_batches(before)
            for state, request in shown:
                state.show(request)
            REQUESTS.reset(token)

    return run


def _set_batches(batches: Iterable[tuple[Any, Any]]) -> None:
    for rows, batch in batches:
        rows.batch = batch
