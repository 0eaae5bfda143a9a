"""What the rows with a trained router over a frozen bank share: where their routers are, and their plan.

The routers come as the option `routers`: a file of `train_routers` (`moerge train-routers`), the folder that holds it,
or `Routers`. Training itself passes `NewRouters`, which begins them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.module_bank import kernel_copy
from ..experts.routers import Routers, read_routers
from .base import Plan
from .gating import expert_mask
from .weighing import Place, Weigher

COMMON = "common"  # the place of what all routers have in common
EXPERTS = "experts"  # "experts/<module>/lora_A": factors that were trained with the routers
GATES = "gates"  # the tensor [E,D] of a row that `route` scores by


def itself(path: str, options: Mapping[str, Any]) -> None:
    """`Learned.where` of routers that every module has for itself."""


@dataclass(frozen=True)
class Learned:
    """What is trained of a row.

    weigher: the class of its routers; None for gates [E,D] that `route` takes.
    where(module path, options): the path of the layer or block that the module's router belongs to and reads; None: the
    module itself has a router of its own, of the class `elsewhere` where there is one.
    common: the class of what the modules' own routers have in common, their attribute `common`; `Run.prompt` begins it.
    kept: the options that training decides and the file keeps; leaves_out: whether option `without` leaves experts out,
    which the file keeps as well: who had no part in the training has none later. training: `train_routers`' defaults
    for the row.
    start: of the gates of a row without a weigher, the deviation of the normal numbers that they begin as.
    loss: "language" (the model's), "entropy" (of its predictions, no labels), "tasks" (one batch of every expert's
    data, weighed by a random preference) or "deferral" (of a row that decodes). experts: whether A and B are trained
    too. own_data: whether it takes data of the experts beside the task's.
    """

    weigher: type[Weigher] | None = None
    where: Callable[[str, Mapping[str, Any]], str | None] = itself
    elsewhere: type[Weigher] | None = None
    common: type[Weigher] | None = None
    kept: tuple[str, ...] = ()
    leaves_out: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[str, Mapping[str, Any]], None] | None = None  # (method, options): ValueError for bad options
    start: float = 0.02
    loss: str = "language"
    experts: bool = False
    own_data: bool = False

    def at(self, block: str | None) -> type[Weigher] | None:
        """The class of the router of a block, or of a module on its own."""
        return self.elsewhere if block is None and self.elsewhere is not None else self.weigher

    def opened(self, method: str, options: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one patch: `routers` read, and what training decided in its place.

        ValueError for routers of another method, and for an option that is `given` and says otherwise than they do.
        """
        if self.check is not None:
            self.check(method, options)
        source = options["routers"]
        if source is None:
            return options
        if isinstance(source, (str, os.PathLike)):
            source = read_routers(source)
        if not isinstance(source, (Routers, NewRouters)):
            raise ValueError(
                f"method '{method}': routers must be a file of `moerge train-routers` or what read_routers gives, got "
                f"{type(source).__name__}"
            )
        if isinstance(source, NewRouters):
            return options | {"routers": InUse(source)}
        if source.method != method:
            raise ValueError(f"method '{method}': the routers were trained for method '{source.method}'")
        if lost := sorted(set(self.kept) - source.options.keys()):
            raise ValueError(f"method '{method}': the routers do not say {', '.join(lost)}; train them again")
        decided = {name: source.options[name] for name in self.kept}
        if other := [name for name in self.kept if name in given and given[name] != decided[name]]:
            said = ", ".join(f"{name}={decided[name]!r} (asked for {given[name]!r})" for name in other)
            raise ValueError(f"method '{method}': the routers were trained with {said}; leave that out or train again")
        if self.leaves_out:
            both = [*_named(source.options.get("without")), *_named(options.get("without"))]
            decided["without"] = ",".join(dict.fromkeys(both)) or None
        if self.check is not None:
            self.check(method, options | decided)  # a header may say anything
        return options | decided | {"routers": InUse(source)}


class NewRouters:
    """Routers that begin: every place has a generator of its own, so that they do not depend on the order."""

    def __init__(self, learned: Learned, width: int, seed: int, common: Mapping[str, Tensor] | None = None):
        self.learned, self.width, self.seed, self.common = learned, width, seed, common

    def problems(self, method: str, bank: ExpertBank) -> list[str]:
        return []

    def at(self, kind: type[Weigher] | None, place: Place, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors at a place."""
        digest = hashlib.sha256(f"{self.seed} {place.path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if kind is None:
            return {
                GATES: torch.randn(place.experts, place.width, generator=generator, dtype=torch.float32, device="cpu")
                * self.learned.start
            }
        return kind.start(place, options, generator)


class InUse:
    """The routers of one patch: those of a block are one object for all its modules."""

    def __init__(self, source: Routers | NewRouters):
        self.source, self.width = source, source.width
        self.weighers: dict[str, Weigher] = {}
        self._common: Weigher | None = None
        self._problems: list[str] | None = None

    def problems(self, method: str, bank: ExpertBank) -> list[str]:
        """Why the routers are not for the bank, found once."""
        if self._problems is None:
            self._problems = self.source.problems(method, bank)
        return self._problems

    def common(self, kind: type[Weigher], experts: int, options: Mapping[str, Any]) -> Weigher:
        """What all routers have in common, one object. ValueError for none, or other shapes."""
        if self._common is None:
            new = isinstance(self.source, NewRouters)
            tensors = self.source.common if new else self.source.tensors.get(COMMON, {})
            kind.check(tensors, Place(COMMON, experts, self.width))
            self._common = kind(tensors, options)
            self._common.path = COMMON
        return self._common

    def at(self, kind: type[Weigher] | None, place: Place, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a router of class `kind` (None: gates) at a place. ValueError for none, or other shapes."""
        if isinstance(self.source, NewRouters):
            return self.source.at(kind, place, options)
        wanted = {GATES: (place.experts, place.width)} if kind is None else kind.shapes(place, options)
        tensors = self.source.tensors.get(place.path) if wanted else {}
        if tensors is None:
            raise ValueError(f"module '{place.path}': the file has no router for it; train them again")
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != {name: tuple(shape) for name, shape in wanted.items()}:
            said = ", ".join(f"{n} {list(s)}" for n, s in wanted.items())
            raise ValueError(
                f"module '{place.path}': expected a router of {said}, the file's is "
                f"{', '.join(f'{n} {list(s)}' for n, s in found.items())}"
            )
        return tensors

    def factors(self, module: str, bank: ModuleBank) -> dict[str, Tensor]:
        """lora_A and lora_B of a module: the bank's, or those that were trained with the router."""
        held = {"lora_A": bank.lora_A, "lora_B": bank.lora_B}
        trained = {} if isinstance(self.source, NewRouters) else self.source.tensors.get(f"{EXPERTS}/{module}", {})
        for name, tensor in trained.items():
            if name not in held or tensor.shape != held[name].shape:
                raise ValueError(
                    f"module '{module}': the file's {name} is {list(tensor.shape)}, the experts' are A "
                    f"{list(bank.lora_A.shape)} and B {list(bank.lora_B.shape)}"
                )
        return held | {name: kernel_copy(tensor.to(bank.device, bank.dtype)) for name, tensor in trained.items()}


def learned_plan(
    bank: ExpertBank,
    module_bank: ModuleBank,
    module_name: str,
    options: Mapping[str, Any],
    *,
    method: str,
    learned: Learned,
) -> Plan:
    """A `Plan` whose router is one of `options["routers"]`."""
    routers = options["routers"]
    if routers is None:
        raise ValueError(
            f"method '{method}' needs routers that were trained over these experts: `moerge train-routers` or "
            "moerge_ext.train_routers(model, experts, data, folder, method=...), then routers=FILE (--routers FILE)"
        )
    if problems := routers.problems(method, bank):
        raise ValueError("\n  - ".join(problems))
    out = excluded(bank, options)
    usable = module_bank.present if out is None else module_bank.present & ~out
    held = routers.factors(module_name, module_bank) | {"lora_bias": module_bank.lora_bias}
    experts, device = module_bank.num_experts, module_bank.device
    block = learned.where(module_name, options)
    common = None if learned.common is None else routers.common(learned.common, experts, options)
    shared = 0 if common is None else routers.width
    own = Place(module_name, experts, module_bank.in_features, module_bank.out_features, shared)
    if learned.weigher is None:
        gates = routers.at(None, own, options)[GATES].to(device)
        return Plan(**held, gates=gates, mask=expert_mask(usable, device))
    key = block or module_name
    if key not in routers.weighers:
        place = own if block is None else Place(block, experts, routers.width)
        kind = learned.at(block)
        weigher = kind(routers.at(kind, place, options), options, block)
        weigher.path, weigher.without, weigher.common = key, out, common
        routers.weighers[key] = weigher
    # who has no LoRA here adds nothing, but has its share in what a block decided for all its modules
    mask = expert_mask(usable, device) if block is None else None
    return Plan(**held, mask=mask, weigher=routers.weighers[key])


def excluded(bank: ExpertBank, options: Mapping[str, Any]) -> Tensor | None:
    """[E] bool of the experts named in option `without`, None for nobody; ValueError for others."""
    names = _named(options.get("without"))
    if unknown := [name for name in names if name not in bank.names]:
        raise ValueError(f"without names {', '.join(unknown)}; the experts are {', '.join(bank.names)}")
    if names and set(names) == set(bank.names):
        raise ValueError("without names every expert: use the base model")
    return torch.tensor([name in names for name in bank.names], device="cpu") if names else None


def _named(names: Any) -> list[str]:
    """The experts of option `without`: a list, or a text with commas."""
    return [name for name in names.split(",") if name] if isinstance(names, str) else list(names or ())


_BLOCK = re.compile(r"(.*?\.\d+)(?:\.|$)")


def layer_of(path: str, options: Mapping[str, Any] | None = None) -> str:
    """The layer of a transformer that a module is in: "model.layers.3.mlp.up_proj" -> "model.layers.3".

    ValueError for a module outside of numbered layers.
    """
    found = _BLOCK.match(path)
    if found is None:
        raise ValueError(f"module '{path}': it is in no numbered layer, and this method has one router per layer")
    return found.group(1)
