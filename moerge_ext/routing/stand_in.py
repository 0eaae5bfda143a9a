"""A module in the place of a layer: what the model and the libraries around it see is still the layer's tensors.

`RoutedLinear` and the layers of gate training compute more than the layer they stand for. The model's state dict, its
`named_parameters()` and whoever moves, shards, offloads, ties or swaps tensors by these names must find the layer's
tensors under the layer's own names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .layers import replace_module

_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOK = ("_hf_hook", "_old_forward", "forward")  # what accelerate sets on a module


class StandIn(nn.Module):
    """Stands for `base_layer`, and calls it. `weight` and `bias` are the base layer's.

    Between `take_place` and `give_back` the two share one set of registries: the layer's parameters, buffers and
    submodules are this module's own, under the layer's names, and what is written through either is seen by both.
    `base_layer` is no submodule then. What this module adds is registered there too: as "moerge_<name>" where the layer
    has the name itself, and still the attribute <name> of this module. A hook of accelerate (offload, dispatch) sits on
    this module meanwhile, where accelerate looks for it, and on the layer afterwards.
    """

    placed = False
    _added: frozenset[str] = frozenset()  # names in the shared registries that are not the base layer's
    _renamed: dict[str, str] = {}  # noqa: RUF012  # attribute -> its name there, where the base layer has that name
    _taken_hook: dict[str, Any] | None = None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def take_place(self, model: nn.Module, path: str) -> None:
        """Puts this module where `path` of `model` has its base layer."""
        self._share()
        self._take_hook()
        replace_module(model, path, self)

    def give_back(self, model: nn.Module, path: str) -> None:
        """Puts the base layer at `path` of `model`, without what this module added to it."""
        self._return_hook()
        self._part()
        replace_module(model, path, self.base_layer)

    def _share(self) -> None:
        base, mine = self.base_layer, self.__dict__
        del self._modules["base_layer"]
        taken = {name for registry in _REGISTRIES for name in base.__dict__[registry]}
        names = {name for registry in _REGISTRIES for name in mine[registry]}
        renamed = {name: f"moerge_{name}" for name in names & taken}
        mine["_renamed"] = renamed
        mine["_added"] = frozenset(renamed.get(name, name) for name in names)
        for registry in _REGISTRIES:
            shared = base.__dict__[registry]
            shared.update(_with_names(mine[registry], renamed))
            mine[registry] = shared
        mine["placed"] = True

    def _part(self) -> None:
        """Each has its own registries again."""
        base, mine, added = self.base_layer, self.__dict__, self._added
        own_names = {there: name for name, there in self._renamed.items()}
        for registry in _REGISTRIES:
            shared = mine[registry]
            if isinstance(shared, set):
                kept = shared & added
                shared -= added
            else:
                kept = {name: shared.pop(name) for name in list(shared) if name in added}
            mine[registry] = _with_names(kept, own_names)
        self._modules["base_layer"] = base
        mine["_renamed"], mine["placed"] = {}, False

    def _take_hook(self) -> None:
        base = self.base_layer
        if "_hf_hook" not in base.__dict__ or "_old_forward" not in base.__dict__:
            return
        taken = {name: base.__dict__.pop(name) for name in _HOOK if name in base.__dict__}
        if getattr(taken["_old_forward"], "__func__", None) is not type(base).forward:
            base.forward = taken["_old_forward"]  # a forward of the instance, below the hook
        self.__dict__["_taken_hook"] = taken
        own = frozenset(name for name in self._added if self._parameters.get(name) is not None)
        with _without(self, own):
            _hook(self, taken["_hf_hook"])
        if own:
            self.__dict__["_hf_hook"] = _HookOfBase(taken["_hf_hook"], own)

    def _return_hook(self) -> None:
        hook, taken = self.__dict__.get("_hf_hook"), self.__dict__.pop("_taken_hook", None)
        hook = hook.hook if isinstance(hook, _HookOfBase) else hook
        for name in _HOOK:
            self.__dict__.pop(name, None)
        if taken is not None and taken["_hf_hook"] is hook:
            self.base_layer.__dict__.update(taken)
        elif hook is not None:
            _hook(self.base_layer, hook, without=self._added)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(self.__dict__.get("_renamed", {}).get(name, name))

    def __setattr__(self, name: str, value: Any) -> None:
        name = self._renamed.get(name, name)
        if name == "base_layer":
            if placed := self.placed:
                self._part()
            # in __dict__ too: found there without nn.Module's __getattr__, which costs
            self.__dict__[name] = self._modules[name] = value
            if placed:
                self._share()
        elif self._is_of_base(name):
            setattr(self.base_layer, name, value)  # as model.tie_weights() and FSDP do
        else:
            if name == "training" and self.placed:
                self.base_layer.training = value
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_base(name):
            delattr(self.base_layer, name)
        else:
            super().__delattr__(name)

    def _is_of_base(self, name: str) -> bool:
        if name in ("weight", "bias"):
            return True
        registered = self.placed and any(name in self.__dict__[registry] for registry in _REGISTRIES)
        return registered and name not in self._added

    def _apply(self, fn, recurse=True):
        if not self.placed:
            return super()._apply(fn, recurse)
        self.base_layer._apply(fn, recurse)  # a quantized layer may have its own way
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if not self.placed:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        self.base_layer.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, *args):
        if not self.placed:
            return super()._load_from_state_dict(*args)
        self.base_layer._load_from_state_dict(*args)

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        if self.placed:
            base = self.base_layer._replicate_for_data_parallel()
            for registry in _REGISTRIES:
                base.__dict__[registry] = replica.__dict__[registry]
            replica.__dict__["base_layer"] = base
        return replica


class _HookOfBase:
    """accelerate's hook, for which the parameters `own` are no part of the module: it fetches and drops the others."""

    def __init__(self, hook: Any, own: frozenset[str]):
        self.hook, self.own = hook, own

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "hook" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.hook, name)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _without(module, self.own):
            return self.hook.pre_forward(module, *args, **kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        with _without(module, self.own):
            return self.hook.post_forward(module, output)


@contextmanager
def _without(module: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """Inside, the module has no parameters of these names."""
    own = {name: module._parameters.pop(name) for name in list(module._parameters) if name in names}
    try:
        yield
    finally:
        module._parameters.update(own)


def _with_names(registry: dict | set, names: dict[str, str]) -> dict | set:
    """`registry` with other `names` for some of its entries."""
    if isinstance(registry, set):
        return {names.get(name, name) for name in registry}
    return {names.get(name, name): value for name, value in registry.items()}


def _hook(module: nn.Module, hook: Any, without: frozenset[str] = frozenset()) -> None:
    """accelerate's hook on `module`: what it knows of the tensors stays, but for the names in `without`."""
    from accelerate.hooks import add_hook_to_module

    parts = getattr(hook, "hooks", (hook,))
    before = [dict(vars(part)) for part in parts]
    add_hook_to_module(module, hook)
    for part, known in zip(parts, before, strict=True):
        if "original_devices" in known:
            known["original_devices"] = {k: v for k, v in known["original_devices"].items() if k not in without}
        vars(part).update(known)
