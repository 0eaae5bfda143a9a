"""What the blocks of a handle set (`queries`, `affinities`, `disabled`, `record`), each for its own forwards.

A block is seen by the code inside of it and by the threads and asyncio tasks begun there, to their own end; requests in
other threads and tasks are not touched. Nothing of it is part of the model: copies and pickles begin without.

A graph of torch.compile cannot read context variables. It reads what its thread shows (`RoutingState.shown`), which is
the request of the only block stack of that thread; where that is not certain, the layers run outside of the graph.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .outside_graphs import keep_outside, outside_of_graphs
from .repeated import carry_into_checkpoints
from .threads import REQUESTS, carry_into_threads, is_foreign_thread
from .trace import Trace


class Affinities:
    """The score bias [N,E] float32 of one block's rows, in a buffer that no other block writes to meanwhile."""

    def __init__(self, slot: _Slot) -> None:
        self._slot = slot
        self.open = True  # until the block ends; who was begun inside may go on
        self.rows: Any = None  # what checks the batches of these rows
        self.follow: Callable[[Tensor], None] | None = None  # sees the ids of every step of `generate`

    @property
    def bias(self) -> Tensor:
        return self._slot.buffer

    def set(self, bias: Tensor) -> None:
        """Written in place while the shape stays, so that a captured graph sees the new values."""
        self._slot.write(bias)

    def note_capture(self) -> None:
        """Called when a layer on a GPU reads the buffer: a graph that is being captured reads it ever after."""
        if torch.cuda.is_current_stream_capturing():
            self._slot.captured = True


class _Slot:
    """A buffer, and who holds it."""

    def __init__(self, bias: Tensor) -> None:
        self.buffer = _copy(bias)
        self.captured = False
        self.holder: weakref.ref[Affinities] | None = None

    def write(self, bias: Tensor) -> None:
        # a tensor made in inference mode could not be written again outside of it
        with torch.inference_mode(False), torch.no_grad():
            if self.fits(bias):
                self.buffer.copy_(bias)
            else:
                self.buffer = _copy(bias)

    def fits(self, bias: Tensor) -> bool:
        return self.buffer.shape == bias.shape and self.buffer.device == bias.device

    def is_free(self) -> bool:
        holder = None if self.holder is None else self.holder()
        return holder is None or (self.captured and not holder.open)


def _copy(bias: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return bias.detach().clone()


def for_graph(bias: Tensor) -> Tensor:
    """A block's rows as autograd may keep them for backward, before which the next block may have the buffer."""
    return bias.clone() if torch.is_grad_enabled() else bias


@dataclass(frozen=True, eq=False)
class Request:
    """What applies to a forward."""

    affinities: Affinities | None = None
    enabled: bool = True  # False: every layer is its base alone
    trace: Trace | None = None
    tokens: Any = None  # RealTokens, with a trace: which tokens it counts
    outer: Request | None = None  # of the block around

    @property
    def bias(self) -> Tensor | None:
        """[N,E] float32, added to the scores of the N rows."""
        return None if self.affinities is None else self.affinities.bias

    @property
    def rows(self) -> Any:
        """What knows which of several rows a token belongs to."""
        return None if self.affinities is None else self.affinities.rows


IDLE = Request()
AMBIGUOUS = "several requests are open, in threads or tasks: a graph cannot tell which of them this forward is of"


class RoutingState:
    """The requests of one patched model; every RoutedLinear of it asks here."""

    def __init__(self) -> None:
        keep_outside()
        carry_into_checkpoints()
        self.busy = False  # whether any block is open, in whatever thread or task
        self._open: list[Request] = []
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()
        self._local = threading.local()

    def __reduce__(self) -> tuple:
        return RoutingState, ()

    def current(self) -> Request:
        """The request of the running code."""
        requests = REQUESTS.get()
        if request := requests.get(self):
            return request
        return self._of_backward() if self.busy and not requests else IDLE

    @property
    def bias(self) -> Tensor | None:
        """[N,E] float32: that of the current rows."""
        return self.current().bias

    def _of_backward(self) -> Request:
        """In a thread of autograd, where gradient checkpointing repeats a forward: the only request there is."""
        if torch._C._current_graph_task_id() == -1 or not is_foreign_thread():
            return IDLE
        around = [request.outer for request in self._open]
        innermost = [request for request in self._open if request not in around]
        if len(innermost) != 1:
            raise RuntimeError(
                f"{len(innermost)} requests are open in several threads or tasks, and gradient checkpointing repeats a "
                "forward for one of them in a thread of autograd's own, which cannot tell for which: run them one "
                "after another, or without checkpointing"
            )
        return innermost[0]

    def shown(self) -> Request | None:
        """What a graph may read; None where the layer must ask `current()` outside of it."""
        request = getattr(self._local, "request", None)
        return IDLE if request is None and not self.busy else request

    def of_forward(self) -> Request:
        """The request of a forward that begins, in a graph or outside."""
        request = self.shown() if torch.compiler.is_compiling() else self.current()
        return _current(self) if request is None else request

    def show(self, request: Request | None) -> Request | None:
        """Sets what `shown` says in this thread (None: nothing is certain) and returns what it was."""
        before = getattr(self._local, "request", None)
        self._local.request = request
        return before

    @contextmanager
    def block(self, *, bias: Tensor | None = None, **changes: Any) -> Iterator[Request]:
        """Code inside has the request of the code around, but for `changes` and rows of its own with `bias` [N,E].

        RuntimeError when a CUDA graph reads the rows of another block that is still open.
        """
        carry_into_threads()
        outer, looped = self.current(), _in_event_loop()
        affinities = outer.affinities if bias is None else self._lend(bias)
        request = replace(outer, affinities=affinities, outer=outer, **changes)
        token = REQUESTS.set({**REQUESTS.get(), self: request})
        before = self.show(None)
        nested = (before or IDLE) is outer
        if nested and not looped:
            self.show(request)
        self._count(request, +1)
        try:
            yield request
        finally:
            self._count(request, -1)
            self.show(before if nested and not looped else None)
            if bias is not None:
                affinities.open = False
            _leave(token, self, request)
            del request, affinities, token  # an exception's traceback must not keep the rows' buffer

    def _lend(self, bias: Tensor) -> Affinities:
        with self._lock:
            slot = next((s for s in self._slots if s.fits(bias) and (s.captured or s.is_free())), None)
            if slot is not None and not slot.is_free():
                raise RuntimeError(
                    "a CUDA graph was captured with the rows of a block of this model, and another block has them: "
                    "requests that replay one graph run one after another"
                )
            if slot is None:
                self._slots = [s for s in self._slots if s.captured or not s.is_free()]
                slot = _Slot(bias)
                self._slots.append(slot)
            else:
                slot.write(bias)
            lent = Affinities(slot)
            slot.holder = weakref.ref(lent)
            return lent

    def _count(self, request: Request, change: int) -> None:
        with self._lock:
            if change > 0:
                self._open.append(request)
            else:
                self._open = [other for other in self._open if other is not request]
            self.busy = bool(self._open)


@outside_of_graphs(AMBIGUOUS)
def _current(state: RoutingState) -> Request:
    return state.current()


def _leave(token: Any, state: RoutingState, request: Request) -> None:
    try:
        REQUESTS.reset(token)
    except ValueError:  # left in another context than entered, as fixtures and dependencies with a yield do
        requests = REQUESTS.get()
        if requests.get(state) is request:
            REQUESTS.set({key: value for key, value in requests.items() if key is not state})


def _in_event_loop() -> bool:
    """Whether asyncio runs other tasks in this thread, between any two awaits."""
    events = sys.modules.get("asyncio.events")
    return events is not None and events._get_running_loop() is not None
