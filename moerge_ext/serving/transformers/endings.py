"""The last line of a stream: `data: [DONE]`, by which clients of OpenAI's completions and chats know that it is whole.

transformers' server (5.23) ends its streams without it, and a client that waits for it takes the answer for cut off.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from .bodies import COMPLETION

HANDLERS = (COMPLETION, "ChatCompletionHandler")  # transformers' classes; `/v1/responses` ends otherwise
DONE = "data: [DONE]\n\n"


def say_done(handler: Any) -> None:
    """transformers' handler of an endpoint ends its streams as OpenAI's does."""
    if type(handler).__name__ not in HANDLERS or "handle_request" in vars(handler):
        return
    theirs = handler.handle_request

    async def handle_request(*args: Any, **kwargs: Any) -> Any:
        answer = await theirs(*args, **kwargs)
        if hasattr(answer, "body_iterator"):
            answer.body_iterator = _then_done(answer.body_iterator)
        return answer

    handler.handle_request = handle_request


async def _then_done(events: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with aclosing(events):  # theirs ends with ours: by it they notice who leaves
        async for event in events:
            yield event
        yield DONE
