"""What requests say of their routing, read where they come in: refused there, or made a part of their cache key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..pool import rules
from ..requests import Choice, Rules
from ..settings import KEY
from .steps import CHECKED
from .worker import settings_of

_RULES = "_moerge_rules"


def process_inputs(theirs: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """`InputProcessor.process_inputs`: ValueError, which becomes HTTP 400, for a request that asks for what is not."""
    made = theirs(processor, *args, **kwargs)
    params = made.sampling_params
    if params is None:
        return made
    extra = dict(params.extra_args or {})
    said = extra.pop(KEY, None)
    if CHECKED in extra:
        raise ValueError(f"moerge: {CHECKED!r} is no argument of requests, say {KEY!r}")
    known = _rules(processor)
    if known is None:
        if said is not None:
            raise ValueError("moerge: this server has no experts (additional_config names none)")
        return made
    choice = known.read(said)
    if choice is not None:
        extra[CHECKED] = choice.as_dict()
        made.cache_salt = _salt(made.cache_salt, choice)
    params.extra_args = extra or None
    return made


def _salt(salt: str | None, choice: Choice) -> str:
    return choice.key() if salt is None else f"{choice.key()}:{salt}"


def _rules(processor: Any) -> Rules | None:
    """What requests may say to this engine; read from the experts' headers once."""
    if not hasattr(processor, _RULES):
        config = processor.vllm_config
        settings = settings_of(config)
        found = None if settings is None else rules(settings, settings.expert_names(config.model_config.model))
        setattr(processor, _RULES, found)
    return getattr(processor, _RULES)
