"""What a language model's output embeddings read: its last hidden state, of which the logits are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LastHidden:
    """`states` [N,T,D]: those of the last forward."""

    def __init__(self) -> None:
        self._states: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """RuntimeError when no forward has reached the output embeddings."""
        if self._states is None:
            raise RuntimeError("the model ran without its output embeddings: it gave no last hidden state")
        return self._states

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states = args[0] if args else next(iter(kwargs.values()))


@contextmanager
def last_hidden(model: Any) -> Iterator[LastHidden]:
    """Inside, every forward of `model` leaves its last hidden states."""
    seen = LastHidden()
    hook = output_embeddings(model).register_forward_pre_hook(seen._read, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def output_embeddings(model: Any) -> nn.Module:
    """The module with weight [V,D]; ValueError for a model without one."""
    found = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if found is None or getattr(found, "weight", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings: expected a language model of transformers, causal or "
            "encoder-decoder"
        )
    return found
