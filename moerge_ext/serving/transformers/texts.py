"""Requests of transformers' server that are routed by the text of their prompt.

One by one, a prompt's affinities are those of its whole answer. In a batch, whose tokens are packed into one row, every
request has its own, by the lengths that the batch says (`cu_seq_lens_q`); blocks of the cache are then no longer shared
between requests that begin alike, since they may be routed differently.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig

from ...routing.patch import Handle
from ..queries import Prompts, Queries
from .context import refusal

KEPT = 10_000  # requests whose affinities are at hand; those of older ones are found once more
UNSHARED = ("allow_block_sharing", "use_cuda_graph", "use_async_batching")  # what a batch's config must not ask for

Scores = Callable[[Sequence[int]], tuple[float, ...]]


def scores_of(queries: Queries, method: str, tokenizer: Any) -> Scores:
    """What finds the affinities [E] of a prompt's tokens; HTTP 400 for a prompt without text."""
    prompts = Prompts(tokenizer, "ask with some text")

    def scores(ids: Sequence[int]) -> tuple[float, ...]:
        try:
            return queries.affinities(method, prompts.text(None, ids))
        except ValueError as error:
            raise refusal(str(error).removeprefix("moerge: ")) from None

    return scores


def route_by_texts(model: nn.Module, handle: Handle, scores: Scores) -> None:
    """`model.generate` and the model's batches are routed by what `scores` finds for each prompt."""
    generate, batching = model.generate, model.init_continuous_batching

    def generate_one(*args: Any, **said: Any) -> Any:
        ids = said["input_ids"] if "input_ids" in said else args[0]
        with handle.affinities(scores(ids[0].tolist())):
            return generate(*args, **said)

    def init_continuous_batching(*args: Any, continuous_batching_config: Any = None, **said: Any) -> Any:
        config = continuous_batching_config or ContinuousBatchingConfig()
        for option in UNSHARED:
            setattr(config, option, False)
        with handle.disabled():  # it tries the model
            made = batching(*args, continuous_batching_config=config, **said)
        held = Held(made, handle, scores)
        made.add_request = held.add(made.add_request)
        model.forward = held.forward(model.forward)
        return made

    model.generate, model.init_continuous_batching = generate_one, init_continuous_batching


class Held:
    """The affinities of the requests of one `ContinuousBatchingManager`."""

    def __init__(self, batching: Any, handle: Handle, scores: Scores):
        self.batching, self.handle, self.scores = batching, handle, scores
        self._found: OrderedDict[str, tuple[float, ...]] = OrderedDict()  # {request: [E]}, the longest unused first

    def add(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """`add_request`, in the thread that asks: a batch does not wait for the embedder."""

        def add_request(input_ids: list[int], request_id: str | None = None, **said: Any) -> Any:
            try:
                found = self.scores(input_ids)
            except Exception:
                self.batching.output_router.result_handlers.pop(request_id, None)  # of an answer that will not come
                raise
            if request_id is not None:  # before the batch has it: a client may use a name again
                self._keep(request_id, found)
            return theirs(input_ids, request_id=request_id, **said)

        return add_request

    def forward(self, theirs: Callable[..., Any]) -> Callable[..., Any]:
        """The model's, of a packed batch; of no request's tokens, as where it is tried, without experts."""

        def forward(*args: Any, **said: Any) -> Any:
            ends, processor = said.get("cu_seq_lens_q"), self.batching.batch_processor
            states = [] if processor is None else [f.state for f in processor.inputs_and_outputs.requests_in_batch]
            rows = [] if ends is None else [self._of(state) for state in states]
            if not rows:
                with self.handle.disabled():
                    return theirs(*args, **said)
            with self.handle.affinities(padded(rows, ends.numel() - 1)):
                return theirs(*args, **said)

        return forward

    def _of(self, state: Any) -> tuple[float, ...]:
        found = self._found.get(state.request_id)
        if found is None:  # initial_tokens may have grown, where a request was put back
            found = self.scores(state.initial_tokens[: state._true_initial_tokens or None])
        return self._keep(state.request_id, found)

    def _keep(self, name: str, found: tuple[float, ...]) -> tuple[float, ...]:
        self._found[name] = found
        self._found.move_to_end(name)
        while len(self._found) > KEPT:
            self._found.popitem(last=False)
        return found


def padded(rows: list[tuple[float, ...]], count: int) -> Tensor:
    """[count,E]: the rows, and zeros for sequences that a batch is filled up with."""
    rows = rows + [(0.0,) * len(rows[0])] * (count - len(rows))
    return torch.tensor(rows, dtype=torch.float32, device="cpu")
