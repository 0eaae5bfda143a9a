"""The experts under the paths of a model: what was renamed, what was left out, what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..experts.bank import ExpertBank
from ..experts.idle import idle_experts
from ..experts.keys import bare_path
from ..experts.live_peft import is_peft_model
from ..experts.renaming import renamed_bank
from ..files.counting import counted
from ..files.listing import listed
from ..methods.base import Routing
from .base_model import BaseCheck, saved_problems
from .naming import ModelPaths, Naming
from .parameter_banks import Placement, place
from .products import layer_features
from .provenance import made_for
from .refusals import layer_problems, no_effect
from .routed_experts import RoutedExperts
from .routed_linear import RoutedLinear

MISSING = ("error", "drop")
LEAVE_OUT = 'patch(..., missing="drop") leaves such modules out, load_experts(..., modules=...) takes the others'


@dataclass
class Fitted:
    """A bank whose module paths are the model's. `notes` are to be said when the patch succeeds.

    placement: where the modules are that belong to fused experts, which the bank has not. made_for: which model the
    experts were made for and which this is, when their modules do not fit it.
    """

    experts: ExpertBank
    placement: Placement = field(default_factory=Placement)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made_for: str | None = None


def on_model(
    model: nn.Module, experts: ExpertBank, method: str, routing: Routing | None, missing: str, *, by_rank: bool = False
) -> tuple[Fitted, BaseCheck]:
    """The experts under the model's own paths, and what keeps them from fitting it and its weights.

    by_rank: as of `layer_problems`.
    """
    if problems := _state_problems(model):
        nothing = ExpertBank(experts.names, {})
        return Fitted(nothing, problems=problems), BaseCheck(model, nothing, method)
    placement = place(model, experts.modules, experts.parameter_gates.paths())
    fitted = fit(model, _linears(experts, placement), missing)
    fitted.placement = placement
    if missing == "drop" and experts.modules and not fitted.experts.modules and not placement.parameters:
        some = listed([f"'{path}'" for path in experts.modules], "module")
        fitted.problems.append(
            f"none of the experts' modules is in {type(model).__name__} ({some}): load_experts(..., "
            "rename={old: new}) if they are there"
        )
    fitted.problems += placement.problems
    left_out = _leave_out_idle(model, fitted)
    misfits = _size_problems(model, fitted.experts)
    if fitted.problems or misfits:
        fitted.made_for = made_for(model, experts.names, experts.bases)
    fitted.problems += _start_problems(experts, placement)
    fitted.notes += placement.notes
    base = BaseCheck(model, fitted.experts, method, left_out)
    if not experts.modules:
        fitted.problems.append("the experts have no LoRA module")
    fitted.problems[:0] = _count_problems(experts, routing)
    fitted.problems += misfits + layer_problems(model, fitted.experts.modules, by_rank=by_rank) + base.problems
    return fitted, base


def on_patched(model: nn.Module, experts: ExpertBank, missing: str) -> Fitted:
    """Experts under the paths of a model whose layers carry others already, and what keeps them from fitting it."""
    placement = place(model, experts.modules, experts.parameter_gates.paths())
    fitted = fit(model, _linears(experts, placement), missing)
    _leave_out_idle(model, fitted)
    fused = listed(list(placement.parameters))
    fitted.problems += [f"fused base experts ({fused}) have no spare slots: patch again"] if fused else []
    fitted.problems += placement.problems + _size_problems(model, fitted.experts)
    fitted.made_for = made_for(model, experts.names, experts.bases) if fitted.problems else None
    fitted.problems += [
        f"expert {name!r} began its LoRA with {claims.init}, which moved a part of the base into the factors: convert "
        "the adapter (PEFT: save_pretrained with path_initial_model_for_weight_conversion), or patch again with it"
        for name, claims in fitted.experts.claims.items()
        if claims.init is not None
    ]
    if not fitted.problems:
        fitted.problems += saved_problems(model, fitted.experts.claims, fitted.experts.modules)
    if not experts.modules:
        fitted.problems.append("the expert has no LoRA module")
    return fitted


def fit(model: nn.Module, experts: ExpertBank, missing: str = "error") -> Fitted:
    """`experts` for this model. `missing` says what becomes of modules that the model has not: "error" or "drop"."""
    model_paths = ModelPaths(model)
    namings = _namings(model_paths, experts)
    fitted = Fitted(experts)
    lost: dict[str, list[str]] = {}  # {module: experts}
    for name, naming in zip(experts.names, namings, strict=True):
        for path in naming.missing:
            lost.setdefault(path, []).append(name)
    lost |= {
        path: []
        for path, module in experts.modules.items()
        if not module.present.any() and bare_path(path) not in model_paths.real
    }
    if lost and missing == "error":
        changed = frozenset().union(*(naming.changed for naming in namings))
        fitted.problems += _missing_problems(model_paths, list(lost), changed)
    elif lost:
        fitted.notes.append(_dropped(model, lost))
    moved = any(old != new for naming in namings for old, new in naming.paths.items())
    if lost or moved:
        try:
            fitted.experts = renamed_bank(experts, [naming.paths for naming in namings], model_paths.real)
        except ValueError as error:
            fitted.problems.append(str(error))
    if note := renamed_note(experts.names, namings):
        fitted.notes.append(note)
    return fitted


def _namings(model_paths: ModelPaths, experts: ExpertBank) -> list[Naming]:
    """One per expert; experts with the same modules share one."""
    owned: list[list[str]] = [[] for _ in experts.names]
    for path, module in experts.modules.items():
        for e in module.present.nonzero().flatten().tolist():
            owned[e].append(path)
    sizes = {path: (module.in_features, module.out_features) for path, module in experts.modules.items()}
    known: dict[tuple[str, ...], Naming] = {}
    for paths in map(tuple, owned):
        if paths not in known:
            known[paths] = model_paths.naming({path: sizes[path] for path in paths})
    return [known[tuple(paths)] for paths in owned]


def _missing_problems(model_paths: ModelPaths, lost: Sequence[str], changed: frozenset[str]) -> list[str]:
    """One line for each cause, with the argument that mends it."""
    causes: dict[str, list[str]] = {}
    for path in lost:
        near = None if path in changed else model_paths.near(path)
        if path in changed:
            cause = f"its version of them is fused or split): {LEAVE_OUT}"
        elif near is not None:
            old, new = _differing(path, near)
            cause = (
                "{has}: were the experts trained on another class of this model?) "
                f"load_experts(..., rename={{'{old}': '{new}'}}) if it is the same layer"
            )
        else:
            cause = f"no layer has a name like it): load_experts(..., rename={{old: new}}) if it is there, {LEAVE_OUT}"
        causes.setdefault(cause, []).append(path)
    name = type(model_paths.model).__name__
    lines = []
    for cause, paths in causes.items():
        has = f"it has '{model_paths.near(paths[0])}'" if "{has}" in cause else ""
        what = "module" if len(paths) == 1 else "modules"
        verb = "is" if len(paths) == 1 else "are"
        where = listed([f"'{path}'" for path in paths], "module")
        lines.append(f"{what} {where} of the experts {verb} not in {name} ({cause.replace('{has}', has)}")
    return lines


def _differing(path: str, near: str) -> tuple[str, str]:
    """What stands before the common end of two paths."""
    old, new = path.split("."), near.split(".")
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    return ".".join(old), ".".join(new)


def _dropped(model: nn.Module, lost: dict[str, list[str]]) -> str:
    who = list(dict.fromkeys(name for names in lost.values() for name in names))
    what, verb = ("module", "is") if len(lost) == 1 else ("modules", "are")
    return (
        f"{len(lost)} {what} of {listed([repr(name) for name in who], 'expert')} {verb} not in {type(model).__name__} "
        f"and left out: {listed(list(lost))}"
    )


def renamed_note(names: Sequence[str], namings: Sequence[Naming]) -> str | None:
    """What was renamed, once for each way of reading; None when nothing was."""
    ways: dict[str, list[str]] = {}
    for name, naming in zip(names, namings, strict=True):
        moved = [(old, new) for old, new in naming.paths.items() if old != new]
        if moved:
            old, new = moved[0]
            how = naming.how or "the wrappers of this model"
            ways.setdefault(f"{counted(len(moved), 'module')} by {how}, such as {old} -> {new}", []).append(name)
    if not ways:
        return None
    lines = [f"{said} ({listed([repr(name) for name in who], 'expert')})" for said, who in ways.items()]
    return "the experts' modules have other names in this model and were renamed: " + "; ".join(lines)


def _state_problems(model: nn.Module) -> list[str]:
    """Why no experts at all can be put into this model."""
    if any(isinstance(layer, (RoutedLinear, RoutedExperts)) for layer in model.modules()):
        return ["the model is patched already: call handle.remove() first (moerge_ext.get_handle(model) finds it)"]
    if is_peft_model(model) and hasattr(model, "unload"):
        return [
            f"the model is PEFT's {type(model).__name__}, whose layers carry adapters already: pass model.unload(), "
            "the base model without them, or model.merge_and_unload(), the base model with them built in "
            "(get_base_model() leaves them on; before either, moerge_ext.load_experts(model) makes experts of them)"
        ]
    return []


def _linears(experts: ExpertBank, placement: Placement) -> ExpertBank:
    """The experts without what belongs to fused experts."""
    rest = experts.with_modules(placement.linears, experts.stored_paths)
    fused = experts.modules.keys() - placement.linears.keys()
    rest.claims = {
        name: replace(claims, scalings={path: s for path, s in claims.scalings.items() if path not in fused})
        for name, claims in experts.claims.items()
    }
    return rest


def _start_problems(experts: ExpertBank, placement: Placement) -> list[str]:
    """PiSSA and OLoRA on fused experts: which part of a stacked weight they began with is not computed again."""
    sources = {piece.source for _, _, pieces in placement.paths() for piece in pieces}
    return [
        f"expert '{name}' began its LoRA on fused experts with {claims.init}, which moved a part of the base into the "
        "factors: convert the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        for name, claims in experts.claims.items()
        if claims.init is not None and sources.intersection(claims.scalings)
    ]


def _leave_out_idle(model: nn.Module, fitted: Fitted) -> list[str]:
    """Leaves out, and returns, the layers that no branch can reach and where no expert changes anything: what PEFT
    trains there never moves.
    """
    bank = fitted.experts
    idle = [path for path, module in bank.modules.items() if idle_experts(module).all()]
    if found := no_effect(model, idle):
        kept = {path: module for path, module in bank.modules.items() if path not in found}
        fitted.experts = bank.with_modules(kept, bank.stored_paths)
        fitted.notes += [
            f"module '{path}' is left out, where no expert changes anything: {found[path]}" for path in found
        ]
    return list(found)


def _count_problems(experts: ExpertBank, routing: Routing | None) -> list[str]:
    if routing is None or routing.top_k is None or routing.top_k <= len(experts):
        return []
    return [
        f"top_k={routing.top_k} is more than the number of experts, E={len(experts)}: "
        f"pass top_k={len(experts)}, or None for all"
    ]


def _size_problems(model: nn.Module, experts: ExpertBank) -> list[str]:
    """Where the layers of the experts' names are not theirs."""
    problems = []
    layers = dict(model.named_modules(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, bank in experts.modules.items():
        if (layer := layers.get(name)) is None:
            continue
        features = layer_features(layer)
        if features is None:
            problems.append(
                f"module '{name}' is not a linear layer but {type(layer).__name__}: load_experts(..., modules=...) "
                "takes the others"
            )
        elif features != (bank.in_features, bank.out_features):
            problems.append(
                f"module '{name}': the layer is D={features[0]} -> O={features[1]}, "
                f"the experts are D={bank.in_features} -> O={bank.out_features}"
            )
        if seen.setdefault(id(layer), name) != name:
            problems.append(f"modules '{seen[id(layer)]}' and '{name}' are one shared layer; it cannot be routed twice")
    return problems
