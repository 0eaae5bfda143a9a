"""What experts say of their base, held against a model and met: parameters saved beside the LoRA, the start that an
initialization took from the base, and the layers that should have weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..experts.claims import BaseClaims, SavedTensor
from ..methods.fixed import PREFIX as ONE_EXPERT
from .base_start import init_problems, on_this_base
from .layers import linear_features, shared_parameters, values_problem
from .own_module import OwnModule
from .state import RoutingState

LORA_ALONE = "; load_experts(..., modules=...) takes the LoRA alone"


class BaseCheck:
    """The experts that a method uses, and what they say of their base, on one model.

    `problems` is what keeps them from it: nothing for a model that lacks their layers, where what it lacks besides is
    no news. left_out: modules that the experts had and that are not in the bank.
    """

    def __init__(self, model: nn.Module, experts: ExpertBank, method: str, left_out: Iterable[str] = ()):
        alone = method.removeprefix(ONE_EXPERT) if method.startswith(ONE_EXPERT) else None
        self.model, self.experts, self.left_out = model, experts, frozenset(left_out)
        self.claims = {name: claims for name, claims in experts.claims.items() if alone in (None, name)}
        self.problems: list[str] = []
        self.own: dict[str, dict[str, Tensor]] = {}  # {module: {parameter: tensor}} of the one expert
        layers = dict(model.named_modules(remove_duplicate=False))
        if any(layers.get(name) is None for name in experts.modules):
            return
        if alone in self.claims:
            self.own, self.problems = own_parameters(model, alone, self.claims[alone], experts.modules)
        else:
            self.problems = saved_problems(model, self.claims, experts.modules)
        self.problems += init_problems(model, self.claims)

    def bank(self) -> ExpertBank:
        """The experts as plain LoRA on this model."""
        return on_this_base(self.model, self.experts, self.claims)

    def unweighted_note(self) -> str | None:
        lines = unweighted_targets(self.model, self.experts, self.claims, self.left_out)
        return (
            "layers have no weights in an expert's file:" + "".join(f"\n  - {line}" for line in lines)
            if lines
            else None
        )

    def place_own(self, state: RoutingState) -> tuple[str, ...]:
        """Puts the modules that the one expert brings into the model; their paths."""
        for path, tensors in self.own.items():
            OwnModule(self.model.get_submodule(path), tensors, state).take_place(self.model, path)
        return tuple(self.own)


def differing(model: nn.Module, claims: BaseClaims) -> tuple[dict[str, SavedTensor], list[str]]:
    """({parameter path: tensor} of the saved parameters that are not the model's, why others cannot be compared).

    Equal is what rounds to the same values in the type of one of the two. Buffers that the model computes by itself are
    no parameters that it could be given.
    """
    if not claims.saved:
        return {}, []
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    computed = {
        f"{path}.{leaf}" for path, module in model.named_modules() for leaf in module._non_persistent_buffers_set
    }
    changed, problems = {}, []
    for path, saved in claims.saved.items():
        if path in computed:
            continue
        ours = tensors.get(path)
        if ours is None:
            problems.append(
                f"its file holds {path} {list(saved.shape)}, which {type(model).__name__} does not have{LORA_ALONE}"
            )
        elif tuple(ours.shape) != saved.shape:
            hint = " (was the vocabulary resized, or is it a head for other classes?)" if len(saved.shape) == 2 else ""
            problems.append(
                f"its file holds {path} {list(saved.shape)}, the model's is {list(ours.shape)}{hint}{LORA_ALONE}"
            )
        elif why := values_problem(ours):
            problems.append(f"its file holds {path}, and the model's cannot be compared with it: {why}")
        elif not _equal(saved.read(), ours.detach()):
            changed[path] = saved
    return changed, problems


def saved_problems(model: nn.Module, experts: Mapping[str, BaseClaims], routed: Iterable[str]) -> list[str]:
    """Why experts that bring their own parameters of the base cannot be routed on this model; routed: its layers."""
    found, routed = [], frozenset(routed)
    for name, claims in experts.items():
        changed, problems = differing(model, claims)
        if carrying := carried(changed, routed):
            problems.append(_carrying_problem(carrying))
        if beside := [path for path in changed if path not in carrying]:
            alone = "" if carrying else f"method 'expert:{name}', or "
            problems.append(
                f"it was trained with its own {_names(beside)}, saved beside its LoRA and not equal to the model's"
                f"{LORA_ALONE}. With them: {alone}load them into the model first. An embedding or "
                "head that was saved and not trained: save the adapter again from the model it was trained on, with "
                "save_embedding_layers=False"
            )
        found += [f"expert {name!r}: {problem}" for problem in problems]
    return found


def carried(paths: Iterable[str], routed: frozenset[str]) -> list[str]:
    """Which parameters are of layers that carry a LoRA as well, so that neither is to be had without the other."""
    return [path for path in paths if path.rpartition(".")[0] in routed]


def _carrying_problem(paths: list[str]) -> str:
    return (
        f"it was trained with its own {_names(paths)}, of a layer that carries its LoRA as well: load such "
        "parameters into the model first, or leave these layers out by load_experts(..., modules=...)"
    )


def own_parameters(
    model: nn.Module, name: str, claims: BaseClaims, routed: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """({module path: {parameter: tensor}} that one expert brings, for a model that follows it alone; problems)."""
    changed, problems = differing(model, claims)
    shared = shared_parameters(model)
    carrying, tied = carried(changed, frozenset(routed)), []
    found: dict[str, dict[str, Tensor]] = {}
    for path, saved in changed.items():
        module, _, leaf = path.rpartition(".")
        if path in carrying:
            continue
        if path in shared:
            tied.append(f"{path}, which the model shares with {shared[path]}")
        else:
            found.setdefault(module, {})[leaf] = saved.read()
    if carrying:
        problems.append(_carrying_problem(carrying))
    if tied:
        problems.append(f"it was trained with its own {'; '.join(tied)}{LORA_ALONE}")
    return found, [f"expert {name!r}: {problem}" for problem in problems]


def unweighted_targets(
    model: nn.Module, experts: ExpertBank, claims: Mapping[str, BaseClaims], left_out: frozenset[str]
) -> list[str]:
    """One line for all experts that lack the same layers: those their configs target and their files do not hold."""
    linears = [path for path, layer in model.named_modules() if linear_features(layer) is not None]
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, claim in claims.items():
        if claim.targets is not None:
            e = experts.index(name)
            present = (path for path, module in experts.modules.items() if module.present[e])
            held = left_out.union(present, claim.whole())
            if missing := tuple(path for path in claim.targets.wanted(linears) if path not in held):
                groups.setdefault(missing, []).append(repr(name))
    return [
        f"{_names(paths)}: targeted by the config of {_names(names)}, whose file holds no weights for it; the base "
        "alone computes there"
        for paths, names in groups.items()
    ]


def _equal(saved: Tensor, ours: Tensor) -> bool:
    saved = saved.to(ours.device)
    return bool(torch.equal(saved.to(ours.dtype), ours) or torch.equal(saved, ours.to(saved.dtype)))


def _names(names: Iterable[Any], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
