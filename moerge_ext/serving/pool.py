"""The experts that are served, planned for every method on the model's modules, without its weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..experts.bank import ExpertBank
from ..methods import get_method
from ..methods.base import Method, Plan, Routing
from ..routing.absent import alone_note
from ..routing.fitting import on_model
from ..routing.layers import linear_features
from ..routing.planning import configured, listing, plans_of
from .requests import Rules
from .settings import Settings

CANNOT = "cannot serve the experts with method '{}'"


@dataclass(frozen=True)
class Planned:
    """One method for all modules."""

    method: Method
    routing: Routing | None
    factored: bool
    options: dict[str, Any]
    plans: dict[str, Plan]

    @property
    def bias(self) -> Any:
        """What makes a score bias [N,E] of affinities [N,E]; None for a method that adds none."""
        return None if self.method.bias is None else partial(self.method.bias, options=self.options)


@dataclass(frozen=True)
class Pool:
    """names: the experts; methods: the default first; sizes: {module of the model: (D, O)}, with experts or without."""

    names: tuple[str, ...]
    methods: list[Planned]
    sizes: dict[str, tuple[int, int]]

    @property
    def modules(self) -> list[str]:
        return list(self.methods[0].plans)


def rules(settings: Settings, names: tuple[str, ...]) -> Rules:
    """What requests may say, by settings whose methods are known."""
    rows = {name: get_method(name) for name in settings.variants()}
    whole = any(row.routing is not None for row in rows.values())
    return Rules(names, {name: row.bias is not None for name, row in rows.items()}, whole, settings.requests)


def meta_model(config: Any) -> nn.Module:
    """transformers' model of a config, without weights: its modules have the paths that experts know."""
    import transformers

    name = (getattr(config, "architectures", None) or [""])[0]
    kind = getattr(transformers, name, None)
    with torch.device("meta"):
        if kind is not None and hasattr(kind, "_from_config"):
            return kind._from_config(config).eval()
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def pool_of(settings: Settings, config: Any, base: Any) -> Pool:
    """The experts loaded and every method planned; ValueError that lists everything wrong. base: the model's folder."""
    return planned(settings, settings.load(base), meta_model(config))


def planned(settings: Settings, experts: ExpertBank, model: nn.Module) -> Pool:
    """The methods of the settings on a model; ValueError that lists everything wrong, notes as one warning."""
    methods, notes, said = [], [], {}
    for name, options in settings.variants().items():
        try:
            made, found = _method(name, options, settings, experts, model)
        except ValueError as error:
            said.setdefault(str(error).partition("\n")[2] or str(error), []).append(name)
        else:
            methods.append(made)
            notes += found
    if said:
        heads = [CANNOT.format("', '".join(names)) + ":\n" + text for text, names in said.items()]
        raise ValueError("\n".join(heads))
    for note in dict.fromkeys(notes):
        warnings.warn(f"serve: {note}", stacklevel=2)
    layers = ((path, linear_features(layer)) for path, layer in model.named_modules())
    sizes = {path: features for path, features in layers if features is not None}
    return Pool(experts.names, methods, sizes)


def _method(
    name: str, options: dict[str, Any], settings: Settings, experts: ExpertBank, model: nn.Module
) -> tuple[Planned, list[str]]:
    chosen = (settings.absent, settings.missing, dict(options))
    row, (routing, aggregation, kept) = configured(experts, name, "native", *chosen)
    problems = _unserved(row, kept)
    fitted, base = on_model(model, experts, row.name, routing, settings.missing)
    problems += fitted.problems
    if fitted.placement.parameters:
        problems.append(f"{', '.join(fitted.placement.parameters)}: experts on fused base experts are not served yet")
    if base.own:
        problems.append(f"its expert brings its own {', '.join(base.own)}, which a server cannot exchange")
    plans = {}
    if not problems:
        plans = plans_of(row, base.bank(), kept, settings.absent, problems)
    if problems:
        raise ValueError(listing(CANNOT.format(name), problems))
    notes = [*fitted.notes, alone_note(plans, experts.names, routing)]
    made = Planned(row, routing, aggregation == "factored", kept, plans)
    return made, [note for note in notes if note]


def _unserved(row: Method, options: dict[str, Any]) -> list[str]:
    """Why a method cannot be served at all."""
    problems = []
    if "every" in options:
        problems.append("it reads the text again as it grows, which a server does not do")
    return problems
