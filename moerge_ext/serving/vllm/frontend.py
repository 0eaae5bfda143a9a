"""What requests say of their routing, read where they come in: refused there, or made a part of their cache key."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from ..pool import rules
from ..queries import Prompts
from ..requests import Choice, Rules
from ..settings import KEY
from .steps import CHECKED, TRACED
from .worker import settings_of

RULES, TEXTS = "_moerge_rules", "_moerge_texts"
DEFAULT = "moerge-default"  # in the key of the cache of a request that says nothing, where it has a salt
_SERVING: list[weakref.ref[Any]] = []  # the processor of this process that was made last


def prepare(theirs: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    """`InputProcessor.__init__`, which learns what requests may say, and what finds the affinities of their texts."""
    theirs(processor, *args, **kwargs)
    config = processor.vllm_config
    settings = settings_of(config)
    found = queries = None
    if settings is not None:
        base = config.model_config.model
        found, queries = rules(settings, tuple(settings.expert_folders(base))), settings.queries(base)
    setattr(processor, RULES, found)
    _SERVING[:] = [weakref.ref(processor)]
    setattr(processor, TEXTS, None if queries is None else (queries, Prompts(processor.tokenizer)))


def process_inputs(theirs: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """`InputProcessor.process_inputs`: a ValueError that becomes HTTP 400 for a request that asks for what is not."""
    made = theirs(processor, *args, **kwargs)
    prompt = kwargs["prompt"] if "prompt" in kwargs else args[1]

    def found(method: str, query: str | None) -> tuple[float, ...]:
        queries, prompts = getattr(processor, TEXTS)
        text = prompts.text(_given(prompt), made.prompt_token_ids) if query is None else query
        return queries.affinities(method, text)

    try:
        return _read(made, getattr(processor, RULES), found)
    except ValueError as error:
        raise _refusal()(str(error)) from None


def sampling(theirs: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """`to_sampling_params` of a request over HTTP: what `process_inputs` will refuse, before an answer has begun to
    stream, whose status could be no other."""
    processor = _SERVING[0]() if _SERVING else None
    if processor is not None:
        known = getattr(processor, RULES)
        try:
            _asked(request.vllm_xargs or {}, known, lambda method, query: (0.0,) * len(known.names))
        except ValueError as error:
            raise _refusal()(str(error)) from None
    return theirs(request, *args, **kwargs)


def beam_search(theirs: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    """`to_beam_search_params` of a request: vLLM's beams would not carry what it says of its routing."""
    if KEY in (request.vllm_xargs or {}):
        raise _refusal()("moerge: vLLM's beam search carries no routing of a request: leave it out, or sample")
    return theirs(request, *args, **kwargs)


def beams(theirs: Callable[..., Any], asked: Any, *args: Any, **kwargs: Any) -> Any:
    """`beam_search` of the server and of `LLM`: each of its steps is a request, whose prompt is longer by a token."""
    engine = asked.engine_client if hasattr(asked, "engine_client") else asked.llm_engine
    known = getattr(engine.input_processor, RULES)
    if known is not None and known.default in known.reads:
        raise _refusal()(
            f"moerge: the method '{known.default}' is routed by the text of the prompt, which vLLM's beam search makes "
            "longer at every step: sample instead"
        )
    return theirs(asked, *args, **kwargs)


@functools.cache
def _refusal() -> type[ValueError]:
    """What vLLM answers with HTTP 400, and a ValueError in any version of it."""
    from vllm.exceptions import VLLMValidationError

    return type("RoutingRefused", (VLLMValidationError, ValueError), {})


def _given(prompt: Any) -> str | None:
    """The text of a prompt, before or after vLLM has made tokens of it; None where it came as something else."""
    text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
    return text if isinstance(text, str) else None


def _read(made: Any, known: Rules | None, found: Callable[[str, str | None], tuple[float, ...]] | None = None) -> Any:
    """The request as it goes on: with its choice checked, and in the key of its cache."""
    params = made.sampling_params
    if params is None:
        return made
    extra = dict(params.extra_args or {})
    choice, traced = _asked(extra, known, found)
    extra.pop(KEY, None)
    if known is None:
        return made
    if choice is not None:
        extra[CHECKED] = choice.as_dict()
    made.cache_salt = _salt(made.cache_salt, choice)
    if traced:
        extra[TRACED] = made.request_id
    params.extra_args = extra or None
    return made


def _asked(
    extra: Mapping[str, Any], known: Rules | None, found: Callable[[str, str | None], tuple[float, ...]] | None = None
) -> tuple[Choice | None, bool]:
    """(the choice, whether a trace is wanted) of a request's extra arguments."""
    for ours in (CHECKED, TRACED):
        if ours in extra:
            raise ValueError(f"moerge: {ours!r} is no argument of requests, say {KEY!r}")
    said = extra.get(KEY)
    if known is None:
        if said is not None:
            raise ValueError("moerge: this server has no experts (additional_config names none)")
        return None, False
    return known.read(said, found), known.traced(said)


def _salt(salt: str | None, choice: Choice | None) -> str | None:
    """The key of a request's cache. What a client has salted stands behind ours, where it cannot be taken for ours."""
    if salt is None:
        return None if choice is None else choice.key()
    return f"{DEFAULT if choice is None else choice.key()}:{salt}"
