"""What gradient checkpointing repeats in backward belongs to the blocks that its forward was in.

torch keeps the function that it is to call again. Here it is kept together with what applied to the forward: the
requests, and which sequences the batch had. What was outside of blocks is outside of blocks again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils import checkpoint

from .threads import REQUESTS, inside

_LOCK = threading.Lock()


def carry_into_checkpoints() -> None:
    """From here on, what checkpointing repeats is inside of the blocks that it was in at first."""
    with _LOCK:
        if not hasattr(checkpoint._checkpoint_without_reentrant_generator, "carries_requests"):
            generator, reentrant = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction
            checkpoint._checkpoint_without_reentrant_generator = _carrying(generator, 0)
            reentrant.forward = staticmethod(_carrying(reentrant.forward, 1))


def _carrying(begin: Callable, place: int) -> Callable:
    """`begin`, whose argument at `place` is the function that will be repeated."""

    @wraps(begin)
    def carrying(*args: Any, **kwargs: Any) -> Any:
        function = inside(REQUESTS.get() or {None: None}, args[place])
        return begin(*args[:place], function, *args[place + 1 :], **kwargs)

    carrying.carries_requests = True
    return carrying
