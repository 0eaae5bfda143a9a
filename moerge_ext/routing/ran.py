"""Did it run: after the first forward, the layers that were passed by are named.

A layer whose holder ran without calling it is passed by: its weight is read instead, and its branch has no effect. A
layer whose holder did not run either (an image tower without an image, an expert of a mixture that no token chose) is
not used by this input; that is said, and is no error. Everything is watched by hooks, which go after the first forward.
"""

from __future__ import annotations

import itertools
import re
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .callers import use_of
from .layers import holder, is_container

_SHOWN = 4  # groups of layers in a message
_watches: weakref.WeakValueDictionary[str, FirstForward] = weakref.WeakValueDictionary()
_keys = itertools.count()


class FirstForward:
    """Watches `layers` (paths in `model`) until the model has run once; then warns, or raises RuntimeError if `strict`.

    `what` they are is part of the message: "layers with experts".
    """

    def __init__(self, model: nn.Module, layers: Iterable[str], *, what: str, strict: bool = False):
        self.model, self.layers, self.what, self.strict = model, tuple(layers), what, strict
        self.ran: set[str] = set()
        self.judged = False
        modules = dict(model.named_modules(remove_duplicate=False))
        self._holders = {name: holder(modules, name) for name in self.layers}
        watched = {path for name in self.layers for path in _way_to(name)}
        self._containers = {path for path in watched if is_container(modules[path])}
        self._hooks = [modules[path].register_forward_pre_hook(_Mark(self, path)) for path in sorted(watched)]
        self._hooks.append(model.register_forward_hook(_End(self), always_call=True))
        self._register()

    def _register(self) -> None:
        self.key = str(next(_keys))  # no number: a graph may take one for dynamic
        _watches[self.key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of the model has a watch of its own."""
        self.__dict__.update(state)
        self._register()

    def __enter__(self) -> FirstForward:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Ends the watch. Where only parts of the model have run until then, layers that they passed by are named."""
        if not self.judged and self.ran and "" not in self.ran:
            self.judge(strict=False, whole=False)
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def judge(self, strict: bool, whole: bool = True) -> None:
        """Says what did not run; whole=False: of the modules that ran."""
        self.judged = True
        missed = [name for name in self.layers if name not in self.ran]
        passed_by = [name for name in missed if self._is_passed_by(name)]
        unused = [name for name in missed if name not in passed_by]
        if whole and len(missed) == len(self.layers):
            self._fail(strict, f"the first forward called none of the {len(missed)} {self.what}")
        elif passed_by:
            kinds = sorted({type(self.model.get_submodule(self._holders[name][0])).__name__ for name in passed_by})
            self._fail(
                strict,
                f"the first forward did not call these {self.what}: {self._grouped(passed_by)}. {', '.join(kinds)} "
                "ran, which holds them, and may read their weights, so that they have no effect: leave them out",
            )
        if unused and whole and len(missed) < len(self.layers):
            warnings.warn(
                f"the first forward did not use these {self.what}: {self._grouped(map(self._branch, unused))}. That is "
                "right where the input has nothing for them, such as no image, or no token for an expert of a mixture",
                stacklevel=2,
            )

    def _fail(self, strict: bool, text: str) -> None:
        if strict:
            self._unhook()
            raise RuntimeError(text)
        warnings.warn(text, stacklevel=3)

    def _is_passed_by(self, name: str) -> bool:
        """Whether the layer's holder ran, and has no code that calls the layer and merely did not this time."""
        path, attribute = self._holders[name]
        if path not in self.ran:
            return False
        beside = name.rpartition(".")[0]
        if beside != path and any(other.startswith(beside + ".") for other in self.ran):
            return False  # one of a list, of which others ran
        use = use_of(self.model.get_submodule(path), attribute)
        return use is None or use.read or not use.called

    def _branch(self, name: str) -> str:
        """The outermost module on the way to an unused layer of which nothing ran."""
        idle = (path for path in _way_to(name) if path not in self.ran and path not in self._containers)
        return next(path for path in idle if path and not any(other.startswith(path + ".") for other in self.ran))

    def _grouped(self, paths: Iterable[str]) -> str:
        """The paths, those that differ in numbers alone as one."""
        groups: dict[str, set[str]] = {}
        for path in paths:
            groups.setdefault(re.sub(r"(?<![A-Za-z])\d+(?![^.])", "*", path), set()).add(path)
        said = [next(iter(of)) if len(of) == 1 else f"{group} ({len(of)})" for group, of in groups.items()]
        return ", ".join(said[:_SHOWN]) + (f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")


def _way_to(name: str) -> Iterator[str]:
    """The paths from the model itself ("") to the layer."""
    parts = name.split(".")
    for end in range(len(parts) + 1):
        yield ".".join(parts[:end])


class _Mark:
    """A forward pre-hook: the module at `path` runs."""

    def __init__(self, watch: FirstForward, path: str):
        self.watch, self.path = watch, path

    def __call__(self, module: nn.Module, args: tuple) -> None:
        _note(self.watch.key, self.path)


class _End:
    """A forward hook of the model: the first forward is over, or has failed (no output) and does not count."""

    def __init__(self, watch: FirstForward):
        self.watch = watch

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if output is not None:
            _finish(self.watch.key)


def _note(key: str, path: str) -> None:
    if (watch := _watches.get(key)) is not None:
        watch.ran.add(path)


def _finish(key: str) -> None:
    watch = _watches.get(key)
    if watch is None:
        return
    if not watch.judged:
        watch.judge(watch.strict)
    # a graph that is being traced reads the hooks
    if not torch.compiler.is_compiling():
        watch._unhook()


# Run once, when a graph is traced, and no part of the graph. torch.compiler.assume_constant_result sets the same mark,
# and imports the compiler for it.
_note._dynamo_marked_constant = _finish._dynamo_marked_constant = True
