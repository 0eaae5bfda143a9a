"""What stands before `generate` in a model whose method reads a row per sequence (`queries`, `affinities`).

What cannot be routed is refused on entry, by name, and whoever reads the text from another thread is told that it ends.
transformers hands the whole sequences, each beam its own, to `prepare_inputs_for_generation` at every step: there the
rows of a text that grows are made again.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from .state import RoutingState

NOT_SET = (
    "this method takes a number per expert of each sequence, and none is set; run the model inside "
    "`with handle.affinities(s):`, s [N, E] or {name: number}, or, where texts decide, `with handle.queries(texts):`"
)
# decoding that computes several tokens of a text, or parts of it, in one forward
_AT_ONCE = ("assistant_model", "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


class Doors:
    """Stands before the methods of `model` that begin or continue a generation, until `remove`."""

    def __init__(self, model: nn.Module, method: str, state: RoutingState):
        self.model, self.method, self.state = model, method, state
        doors = {
            "generate": _Generate,
            "prepare_inputs_for_generation": _Prepare,
            "init_continuous_batching": _ContinuousBatching,
        }
        self.own = {name: vars(model).get(name) for name in doors if hasattr(model, name)}
        for name in self.own:
            setattr(model, name, doors[name](self, name))

    def remove(self) -> None:
        for name, own in self.own.items():
            if not isinstance(vars(self.model).get(name), _Door):
                continue  # somebody has set another since
            if own is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, own)


class _Door:
    """Stands for the method `name` of the model; a class and no closure, so that copies and pickles have their own."""

    def __init__(self, doors: Doors, name: str):
        self.doors, self.name = doors, name

    @property
    def inner(self) -> Any:
        own, model = self.doors.own[self.name], self.doors.model
        return getattr(type(model), self.name).__get__(model) if own is None else own

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.inner)

    @property
    def __doc__(self) -> str | None:
        return self.inner.__doc__


class _Generate(_Door):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = _named(self.__signature__, args, kwargs)
        try:
            self._check(given)
            return self.inner(*args, **kwargs)
        except BaseException:
            if given.get("streamer") is not None:
                given["streamer"].end()  # its reader would wait for ever
            raise

    def _check(self, given: dict[str, Any]) -> None:
        request = self.doors.state.current()
        if request.enabled and request.bias is None:
            raise RuntimeError(
                f"{NOT_SET}. A thread belongs to the block in which it was started, not to one that has ended"
            )
        if request.affinities is None or request.affinities.follow is None:
            return
        config = given.get("generation_config") or self.doors.model.generation_config
        for option in _AT_ONCE:
            if given.get(option, getattr(config, option, None)):
                raise ValueError(
                    f"method '{self.doors.method}' reads the text again at every token, and with {option} one forward "
                    "computes several: generate without it"
                )


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those of `**kwargs` too."""
    given = signature.bind_partial(*args, **kwargs).arguments
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    return given | given.pop(rest, {})


class _Prepare(_Door):
    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        affinities = self.doors.state.current().affinities
        if affinities is not None and affinities.follow is not None:
            affinities.follow(input_ids)
        return self.inner(input_ids, *args, **kwargs)


class _ContinuousBatching(_Door):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request, method = self.doors.state.current(), self.doors.method
        if request.enabled and request.bias is None:
            raise RuntimeError(NOT_SET)
        if request.affinities is not None and request.affinities.follow is not None:
            raise ValueError(
                f"method '{method}' reads the text again at every token, and continuous batching (generate_batch) does "
                "not say whose tokens a forward computes: use generate"
            )
        if request.bias is not None and len(request.bias) > 1:
            raise ValueError(
                f"{len(request.bias)} rows of affinities are set, and continuous batching (generate_batch) does not "
                "say whose tokens a forward computes: give one query for all, or use generate"
            )
        return self.inner(*args, **kwargs)
