"""Answers without `stream` end when their client leaves.

transformers' server looks for that in streams alone; any other answer is generated to its end (with the context or the
cache at the latest), for nobody, and the requests behind it wait or share the batch with it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from fastapi import HTTPException
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import CBGenerateManager, GenerateManager

from .bodies import hold_to_sense
from .endings import say_done

Receive = Callable[[], Awaitable[dict[str, Any]]]
LAST_OUTPUT = 10.0  # seconds after which a batch has nothing more to say of a request that was cancelled


@dataclass(frozen=True)
class _Client:
    """Whether the client of a request has left, for threads and for its own event loop."""

    left: threading.Event = field(default_factory=threading.Event)
    leaves: asyncio.Event = field(default_factory=asyncio.Event)

    def leave(self) -> None:
        self.left.set()
        self.leaves.set()


_client: ContextVar[_Client | None] = ContextVar("moerge_client", default=None)


def watching(build_server: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `build_server`, whose app knows of every request whether its client is there, refuses what makes
    no sense, and ends streams as OpenAI does."""

    @wraps(build_server)
    def build(*args: Any, generation_state: Any, **options: Any) -> Any:
        for handler in (*args, *options.values()):
            hold_to_sense(handler)
            say_done(handler)
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
        client, messages = _Client(), asyncio.Queue[dict[str, Any]](maxsize=1)

        async def read() -> None:
            while not client.left.is_set():
                if (message := await receive())["type"] == "http.disconnect":
                    client.leave()
                await messages.put(message)

        reader, token = asyncio.create_task(read()), _client.set(client)
        try:
            await self.app(scope, messages.get, send)
        finally:
            reader.cancel()
            _client.reset(token)


def _carrying(manager: Any) -> Any:
    """The manager, whose thread then knows which request it works for, or whose batch loses those of who has left."""
    if isinstance(manager, GenerateManager) and "async_submit" not in vars(manager):
        theirs = manager.async_submit
        manager.async_submit = lambda run, *args, **said: theirs(partial(copy_context().run, run), *args, **said)
    if isinstance(manager, CBGenerateManager) and "generate_non_streaming" not in vars(manager):
        manager.generate_non_streaming = partial(_batched, manager, manager.generate_non_streaming)
    return manager


async def _batched(
    manager: CBGenerateManager, answer: Callable[..., Awaitable[Any]], *args: Any, request_id: str, **said: Any
) -> Any:
    """The answer of a batch, or an error that nobody hears once the client has left and the request is cancelled."""
    answering = asyncio.ensure_future(answer(*args, request_id=request_id, **said))
    if (client := _client.get()) is None:
        return await answering
    leaving = asyncio.ensure_future(client.leaves.wait())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
    finally:
        leaving.cancel()
        if not answering.done():
            answering.cancel()
            manager._cb.cancel_request(request_id)
            handlers = manager._cb.output_router.result_handlers
            asyncio.get_running_loop().call_later(LAST_OUTPUT, handlers.pop, request_id, None)
    raise HTTPException(status_code=499, detail="moerge: the client has left")


class _Left(StoppingCriteria):
    def __init__(self, left: threading.Event):
        self.left = left

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self.left.is_set(), dtype=torch.bool, device=input_ids.device)


def end_with_client(model: nn.Module) -> None:
    """`model.generate` ends at the next token once the client of its request has left."""
    theirs = model.generate

    def generate(*args: Any, **said: Any) -> Any:
        if (client := _client.get()) is not None:
            ends = _Left(client.left)
            said["stopping_criteria"] = StoppingCriteriaList([*(said.get("stopping_criteria") or ()), ends])
        return theirs(*args, **said)

    model.generate = generate
