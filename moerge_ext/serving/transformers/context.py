"""Answers that end with the model's context, where requests run one by one.

transformers' server takes any number of `max_tokens` (1024 where a request says none), and generates on beyond the
positions that the model was trained for; the requests behind such a one wait for it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.pretrained import context_of


def hold_to_context(model: nn.Module) -> None:
    """`model.generate` ends each answer at the context. HTTP 400 for a prompt that fills it or is empty, and
    for no token.
    """
    context, theirs = context_of(model.config), model.generate

    def generate(*args: Any, **said: Any) -> Any:
        config, ids = said.get("generation_config"), said.get("input_ids")
        if config is not None and ids is not None:
            config.max_new_tokens = within(context, ids.shape[-1], config.max_new_tokens)
        return theirs(*args, **said)

    model.generate = generate


def within(context: int | None, prompt: int, new: int | None) -> int | None:
    """How many of `new` tokens (None: any number) a context has room for behind a prompt."""
    check_counts(prompt, new)
    if context is None:
        return new
    if (room := context - prompt) < 1:
        raise refusal(f"the prompt has {prompt} tokens, which leave no room in the context of {context}: shorten it")
    return room if new is None else min(room, new)


def check_counts(prompt: int, new: int | None) -> None:
    """Refuses a prompt of no token, and to answer by fewer than one."""
    if not prompt:
        raise refusal("the prompt has no tokens, and this model's tokenizer adds none: expected at least one")
    if new is not None and new < 1:
        raise refusal(f"max_tokens must be at least 1, got {new}")


def hold_to_template(processor: Any) -> None:
    """HTTP 400 for a chat that the tokenizer of the model has no template for."""
    if getattr(getattr(processor, "tokenizer", processor), "chat_template", None) is None:

        def apply_chat_template(*_: Any, **__: Any) -> Any:
            raise refusal("the model's tokenizer has no chat template: ask /v1/completions, or serve a chat model")

        processor.apply_chat_template = apply_chat_template


def refusal(said: str) -> Exception:
    """HTTP 400, with these words of ours."""
    from fastapi import HTTPException

    return HTTPException(status_code=400, detail=f"moerge: {said}")
