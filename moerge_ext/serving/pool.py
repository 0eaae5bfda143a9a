"""The experts that are served, planned for every method on the model's modules, without its weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..files.listing import listed
from ..methods import get_method
from ..methods.base import Method, Plan, Routing
from ..methods.fixed import PREFIX as ONE_EXPERT
from ..methods.gating import gate_notes
from ..routing.absent import alone_note
from ..routing.few_experts import own_top_k
from ..routing.fitting import on_model
from ..routing.layers import linear_features
from ..routing.planning import configured, listing, plans_of
from ..routing.shares import Share, share_of_plan
from ..routing.slots import spare_problems, with_spare
from .branch import Variant, route_options
from .queries import readers
from .requests import Rules
from .settings import Settings

CANNOT = "cannot serve the experts with method '{}'"


def score_bias(method: Method, options: dict[str, Any]) -> Any:
    """What makes a score bias [N,E] of affinities [N,E]; None for a method that adds none."""
    return None if method.bias is None else partial(method.bias, options=options)


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
        return score_bias(self.method, self.options)


@dataclass(frozen=True)
class Pool:
    """names: the experts; methods: the default first; sizes: {module of the model: (D, O)}, with experts or without."""

    names: tuple[str, ...]
    methods: list[Planned]
    sizes: dict[str, tuple[int, int]]

    @property
    def modules(self) -> list[str]:
        return list(self.methods[0].plans)


def variants(pool: Pool, module: str, share: Share, *, adds_bias: bool, spare: int) -> list[Variant]:
    """What this rank holds of a module, of every method, with `spare` slots after the experts."""
    found = []
    for made in pool.methods:
        plan = share_of_plan(made.plans[module], share, adds_bias=adds_bias)
        options = route_options(made.routing, pool.sizes[module][0], plan.lora_A.shape[0])
        ids = _experts_of(made.method, plan, pool.names)
        spared = with_spare(plan, spare)
        found.append(Variant(made.method.name, spared, options, made.factored, _own_factors(made.method), ids))
    return found


def _own_factors(row: Method) -> bool:
    """Whether a method routes among factors that it makes of all experts, not among the experts' own."""
    return row.routing is not None and row.together


def _experts_of(row: Method, plan: Plan, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """`Variant.ids` of a plan."""
    if row.name.startswith(ONE_EXPERT):
        return (names.index(row.name.removeprefix(ONE_EXPERT)),)
    return tuple(range(len(names))) if plan.lora_A.shape[0] == len(names) else None


def gate_sums(pool: Pool, module: str, spare: int) -> dict[str, Tensor]:
    """{method: [slots] float64, the sum of every gate over all D of a module}."""
    gates = {made.method.name: made.plans[module].gates for made in pool.methods}
    return {name: nn.functional.pad(g.double().sum(1), (0, spare)) for name, g in gates.items() if g is not None}


def rules(settings: Settings, names: tuple[str, ...]) -> Rules:
    """What requests may say, by settings whose methods are known."""
    rows = {name: get_method(name) for name in settings.variants()}
    whole = any(row.routing is not None and not _own_factors(row) for row in rows.values())
    needs = {name: row.bias is not None for name, row in rows.items()}
    reads = () if settings.embedder is None else tuple(readers(rows))
    return Rules(names, needs, whole, settings.requests, settings.traces > 0, reads)


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
    methods = _methods(settings, experts, model, CANNOT)
    layers = ((path, linear_features(layer)) for path, layer in model.named_modules())
    sizes = {path: features for path, features in layers if features is not None}
    return Pool(experts.names, methods, sizes)


def planned_one(settings: Settings, expert: ExpertBank, model: nn.Module, count: int) -> list[Planned]:
    """The methods of the settings for one expert that joins others, `count` with it: they make the same of it alone.

    ValueError that lists everything wrong.
    """
    cannot = f"cannot add expert {expert.names[0]!r} with method '{{}}'"
    return _methods(settings, expert, model, cannot, count)


def _methods(
    settings: Settings, experts: ExpertBank, model: nn.Module, cannot: str, count: int | None = None
) -> list[Planned]:
    methods, notes, said = [], [], {}
    for name, options in settings.variants().items():
        try:
            made, found = _method(name, options, settings, experts, model, count)
        except ValueError as error:
            said.setdefault(str(error).partition("\n")[2] or str(error), []).append(name)
        else:
            methods.append(made)
            notes += found
    if said:
        heads = [cannot.format("', '".join(names)) + ":\n" + text for text, names in said.items()]
        raise ValueError("\n".join(heads))
    for note in dict.fromkeys(notes):
        warnings.warn(f"serve: {note}", stacklevel=3)
    return methods


def _method(
    name: str,
    options: dict[str, Any],
    settings: Settings,
    experts: ExpertBank,
    model: nn.Module,
    count: int | None = None,
) -> tuple[Planned, list[str]]:
    chosen = (settings.absent, settings.missing, dict(options))
    if count is None:
        row, (routing, aggregation, kept) = configured(experts, name, "native", *chosen)
    else:
        row = get_method(name)
        routing, aggregation, kept = row.configure(**options | own_top_k(row, range(count), options))
    problems = _unserved(row, kept) + of_base(experts, row.name)
    experts = _lora_alone(experts)
    fitted, base = on_model(model, experts, row.name, routing if count is None else None, settings.missing)
    problems += spare_problems(settings.spare, row, fitted.experts, fitted.placement.parameters)
    problems += fitted.problems
    if fitted.placement.parameters:
        problems.append(f"{', '.join(fitted.placement.parameters)}: experts on fused base experts are not served yet")
    plans = {}
    if not problems:
        plans = plans_of(row, base.bank(), kept, settings.absent, problems)
        problems += _unserved_plans(plans, model)
    if problems:
        raise ValueError(listing(CANNOT.format(name), problems))
    notes = [*fitted.notes, alone_note(plans, experts, routing), *gate_notes(experts, row.gate_kind)]
    made = Planned(row, routing, aggregation == "factored", kept, plans)
    return made, [note for note in notes if note]


def of_base(experts: ExpertBank, method: str) -> list[str]:
    """Why experts that come with something of the base's own weights cannot be served with a method."""
    problems = []
    for name, claims in experts.claims.items():
        if method.startswith(ONE_EXPERT) and method != ONE_EXPERT + name:
            continue
        if claims.saved:
            problems.append(
                f"expert {name!r} brings parameters of the base, {listed(list(claims.saved))}, which a server does not "
                "exchange: load_experts(..., modules=...) takes the LoRA alone"
            )
        if claims.init is not None:
            problems.append(
                f"expert {name!r} began its LoRA with {claims.init}, which moved a part of the base into the factors: "
                "convert the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
            )
    return problems


def _lora_alone(experts: ExpertBank) -> ExpertBank:
    """The experts without what `of_base` refuses."""
    bare = experts.with_modules(experts.modules, experts.stored_paths)
    bare.claims = {name: replace(c, saved={}, init=None, scalings={}) for name, c in experts.claims.items()}
    return bare


def _unserved_plans(plans: Mapping[str, Plan], model: nn.Module) -> list[str]:
    """Why layers that are planned cannot be served."""
    problems = []
    head = model.get_output_embeddings()
    if heads := [path for path in plans if model.get_submodule(path) is head]:
        problems.append(
            f"{listed(heads, 'module')}: an engine computes the head in a way of its own, where no experts are added: "
            "leave it out (modules)"
        )
    if others := [path for path, plan in plans.items() if plan.branches]:
        problems.append(f"{listed(others, 'module')}: experts that are no LoRA are not served yet")
    if weighed := [path for path, plan in plans.items() if plan.weigher is not None]:
        problems.append(f"{listed(weighed, 'module')}: routers that no option of the ops is are not served yet")
    return problems


def _unserved(row: Method, options: dict[str, Any]) -> list[str]:
    """Why a method cannot be served at all."""
    problems = []
    if "every" in options:
        problems.append("it reads the text again as it grows, which a server does not do")
    return problems
