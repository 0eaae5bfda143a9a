"""What requests say of their routing, read where they come in: refused there, or made a part of their cache key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..pool import rules
from ..requests import Choice, Rules
from ..settings import KEY
from .steps import CHECKED, TRACED
from .worker import settings_of

RULES = "_moerge_rules"


def prepare(theirs: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    """`InputProcessor.__init__`, which learns what requests may say."""
    theirs(processor, *args, **kwargs)
    config = processor.vllm_config
    settings = settings_of(config)
    found = None if settings is None else rules(settings, tuple(settings.expert_folders(config.model_config.model)))
    setattr(processor, RULES, found)


def process_inputs(theirs: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """`InputProcessor.process_inputs`: a ValueError that becomes HTTP 400 for a request that asks for what is not."""
    made = theirs(processor, *args, **kwargs)
    try:
        return _read(made, getattr(processor, RULES))
    except ValueError as error:
        raise _refusal()(str(error)) from None


def beam_search(theirs: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """`to_beam_search_params` of a request: vLLM's beams would not carry what it says of its routing."""
    if KEY in (request.vllm_xargs or {}):
        raise _refusal()("moerge: vLLM's beam search carries no routing of a request: leave it out, or sample")
    return theirs(request, *args, **kwargs)


@functools.cache
def _refusal() -> type[ValueError]:
    """What vLLM answers with HTTP 400, and a ValueError in any version of it."""
    from vllm.exceptions import VLLMValidationError

    return type("RoutingRefused", (VLLMValidationError, ValueError), {})


def _read(made: Any, known: Rules | None) -> Any:
    """The request as it goes on: with its choice checked, and in the key of its cache."""
    params = made.sampling_params
    if params is None:
        return made
    extra = dict(params.extra_args or {})
    said = extra.pop(KEY, None)
    for ours in (CHECKED, TRACED):
        if ours in extra:
            raise ValueError(f"moerge: {ours!r} is no argument of requests, say {KEY!r}")
    if known is None:
        if said is not None:
            raise ValueError("moerge: this server has no experts (additional_config names none)")
        return made
    choice = known.read(said)
    if choice is not None:
        extra[CHECKED] = choice.as_dict()
        made.cache_salt = _salt(made.cache_salt, choice)
    if known.traced(said):
        extra[TRACED] = made.request_id
    params.extra_args = extra or None
    return made


def _salt(salt: str | None, choice: Choice) -> str:
    return choice.key() if salt is None else f"{choice.key()}:{salt}"
