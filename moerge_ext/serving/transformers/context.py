"""Answers that end with the model's context, where requests run one by one.

transformers' server takes any number of `max_tokens` (1024 where a request says none), and generates on beyond the
positions that the model was trained for; the requests behind such a one wait for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.pretrained import context_of


def hold_to_context(model: nn.Module) -> None:
    """`model.generate` ends each answer at the model's context, and refuses a prompt that fills it, by HTTP 400."""
    context, theirs = context_of(model.config), model.generate
    if context is None:
        return

    def generate(*args: Any, **said: Any) -> Any:
        config, ids = said.get("generation_config"), said.get("input_ids")
        if config is not None and ids is not None:
            room = context - ids.shape[-1]
            if room < 1:
                raise _refusal(ids.shape[-1], context)
            config.max_new_tokens = min(room, config.max_new_tokens or room)
        return theirs(*args, **said)

    model.generate = generate


def _refusal(prompt: int, context: int) -> Exception:
    from fastapi import HTTPException

    said = f"moerge: the prompt has {prompt} tokens, which leave no room in the context of {context}: shorten it"
    return HTTPException(status_code=400, detail=said)
