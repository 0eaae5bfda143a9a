"""Gradient checkpointing under a frozen model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gradients_pass_checkpoints(model: nn.Module) -> Iterator[None]:
    """Reentrant gradient checkpointing drops the gradients of a block none of whose inputs requires one, which is
    every first block of a frozen model: inside, its input does.

    A block that is checkpointed as transformers does it gets such an input whatever it reads (audio, images);
    for code that calls torch's `checkpoint` itself, the token embeddings give one. Warns where it is enabled and
    transformers leaves it out.
    """
    switched = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if switched and not any(module.training for module in switched):
        warnings.warn(
            "gradient checkpointing is enabled and does nothing, as the model is in .eval() mode (from_pretrained "
            "leaves it so): call model.train() first",
            stacklevel=3,
        )
    with ExitStack() as stack:
        for module in model.modules():
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if checkpoint is not None and getattr(checkpoint, "keywords", {}).get("use_reentrant", True):
                module._gradient_checkpointing_func = partial(_with_gradient, checkpoint)
                stack.callback(setattr, module, "_gradient_checkpointing_func", checkpoint)
        embeddings = _embeddings(model) if switched else None
        if embeddings is not None:
            stack.callback(embeddings.register_forward_hook(_require_grad).remove)
        yield


def _embeddings(model: nn.Module) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # not of transformers; a model of speech
        return None
    return found if isinstance(found, nn.Module) else None


def _require_grad(_module: nn.Module, _args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
        output.requires_grad_(True)


def _with_gradient(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """checkpoint(function, *args), one of whose float tensors requires a gradient."""
    floats = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    if torch.is_grad_enabled() and floats and not any(args[i].requires_grad for i in floats):
        first = floats[0]
        args = (*args[:first], args[first].detach().requires_grad_(), *args[first + 1 :])
    return checkpoint(function, *args, **kwargs)
