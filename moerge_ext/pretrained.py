"""Base models and tokenizers for the commands, from folders or the hub."""

from __future__ import annotations

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
    """The tokenizer of a model folder or hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def load_model(path: str, *, dtype: str, device: str | torch.device) -> Any:
    """The model (causal or encoder-decoder) of a folder or hub id, in eval mode.

    dtype: "auto" (as stored), "float32", "bfloat16" or "float16". Errors: OSError when there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if is_seq2seq(AutoConfig.from_pretrained(path)) else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=dtype).eval().to(device)


def is_seq2seq(config: Any) -> bool:
    """Whether a transformers config is that of an encoder-decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))
