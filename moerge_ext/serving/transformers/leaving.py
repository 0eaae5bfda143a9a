"""Answers without `stream` end when their client leaves, where requests run one by one.

transformers' server looks for that in streams alone; any other answer is generated to its end (with the context at the
latest), for nobody, and the requests behind it wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager

Receive = Callable[[], Awaitable[dict[str, Any]]]
_left: ContextVar[threading.Event | None] = ContextVar("moerge_client_left", default=None)


def watching(build_server: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `build_server`, whose app knows of every request whether its client is there."""

    @wraps(build_server)
    def build(*args: Any, generation_state: Any, **options: Any) -> Any:
        app = build_server(*args, generation_state=generation_state, **options)
        app.add_middleware(Watch)
        theirs = generation_state.get_manager
        generation_state.get_manager = lambda *said, **more: _carrying(theirs(*said, **more))
        return app

    return build


class Watch:
    """ASGI middleware: reads ahead of the app, so that a client that leaves is noticed at once."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        left, messages = threading.Event(), asyncio.Queue[dict[str, Any]](maxsize=1)

        async def read() -> None:
            while not left.is_set():
                if (message := await receive())["type"] == "http.disconnect":
                    left.set()
                await messages.put(message)

        reader, token = asyncio.create_task(read()), _left.set(left)
        try:
            await self.app(scope, messages.get, send)
        finally:
            reader.cancel()
            _left.reset(token)


def _carrying(manager: Any) -> Any:
    """The manager, whose thread then knows which request it works for."""
    if isinstance(manager, GenerateManager) and "async_submit" not in vars(manager):
        theirs = manager.async_submit
        manager.async_submit = lambda run, *args, **said: theirs(partial(copy_context().run, run), *args, **said)
    return manager


class _Left(StoppingCriteria):
    def __init__(self, left: threading.Event):
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.left.is_set(), dtype=torch.bool, device=input_ids.device)


def end_with_client(model: nn.Module) -> None:
    """`model.generate` ends at the next token once the client of its request has left."""
    theirs = model.generate

    def generate(*args: Any, **said: Any) -> Any:
        if (left := _left.get()) is not None:
            said["stopping_criteria"] = StoppingCriteriaList([*(said.get("stopping_criteria") or ()), _Left(left)])
        return theirs(*args, **said)

    model.generate = generate
