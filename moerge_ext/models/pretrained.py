"""Base models and tokenizers for the commands, from folders or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# transformers' model classes take seconds to import, and `moerge --help` needs none: imported in the functions


def usable_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda:0"), or a ValueError when it cannot be computed on here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # all of these, by the kind of device
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        reason = str(error).partition("\n")[0].partition(". ")[0]  # the rest can be a page
        raise ValueError(
            f"device '{name}' cannot be used here ({reason}); expected a device such as {there}"
        ) from error
    return device


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id; ValueError when there is none."""
    from transformers import AutoTokenizer

    with named(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(path)


def _has_config(path: str) -> bool:
    """Whether there is a model at all."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(path)
    except (OSError, ValueError):
        return False
    return True


def load_model(path: str, *, dtype: str, device: str | torch.device) -> Any:
    """The model (causal or encoder-decoder) of a folder or hub id, in eval mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". Errors: ValueError when there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    with named(path, "model"):
        auto = AutoModelForSeq2SeqLM if is_seq2seq(AutoConfig.from_pretrained(path)) else AutoModelForCausalLM
        return auto.from_pretrained(path, dtype=dtype).eval().to(device)


@contextmanager
def named(path: str, what: str) -> Iterator[None]:
    """transformers' errors, of which some do not say what was looked for, as one that does."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        if Path(path).is_dir():
            raise ValueError(f"folder {path!r} holds no {what} that transformers can load ({reason})") from error
        missing = "model" if what == "tokenizer" and not _has_config(path) else what
        raise ValueError(
            f"{missing} {path!r} was not found: there is no local folder of that name, and the hub has no such "
            f"{missing} for you ({reason}): check the path, or the id, the network and your access"
        ) from error


def is_seq2seq(config: Any) -> bool:
    """Whether a transformers config is that of an encoder-decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def open_ids(tokenizer: Any, text: str, ends: Sequence[int]) -> list[int]:
    """Token ids of a text to be continued: without the end that some tokenizers add, but with one that is its own."""
    ids = tokenizer(text).input_ids
    if not ids or ids[-1] not in ends:
        return ids
    own = tokenizer(text, add_special_tokens=False).input_ids
    added = _ends_of(ids, ends) > _ends_of(own, ends)
    return ids[:-1] if added and len(ids) > 1 else ids


def _ends_of(ids: list[int], ends: Sequence[int]) -> int:
    """How many of `ends` stand at the end."""
    return next((i for i, token in enumerate(reversed(ids)) if token not in ends), len(ids))
