"""From the modules of a bank to the stacked parameters of a model's fused experts.

Adapters hold the LoRA of base expert j under the path of a linear layer of transformers 4
("...mlp.experts.3.gate_proj", "...block_sparse_moe.experts.3.w1"), or as a slice of a whole parameter
("target_parameters" of PEFT, shown as "...mlp.experts.3.gate_up_proj"). transformers' own conversion says which
parameter of the model such a layer became, and which half of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..experts.bank import ExpertBank, ModuleBank
from ..experts.keys import bare_path
from ..files.listing import listed
from .fused_experts import first_parameter, halves_apart, is_dispatched, parameter_sizes, stacked, why_unsupported
from .naming import CONTAINERS
from .peft_layers import carrier_problem, is_peft_layer

_INDEXED = re.compile(r"(?P<experts>.+)\.(?P<index>[0-9]{1,6})\.(?P<leaf>[^.]+)")
WHOLE, GATE, UP = 2, 0, 1  # which rows of a parameter's output
# where the model brings no conversion of its own
_LEAVES = {
    "gate_proj": ("gate_up_proj", GATE),
    "up_proj": ("gate_up_proj", UP),
    "down_proj": ("down_proj", WHOLE),
    "w1": ("gate_up_proj", GATE),
    "w3": ("gate_up_proj", UP),
    "w2": ("down_proj", WHOLE),
}


@dataclass(frozen=True)
class Piece:
    """The LoRA factors of one base expert in some rows of a parameter."""

    source: str  # its path in the bank
    index: int  # j, the base expert
    rows: int  # WHOLE, GATE or UP
    factors: Any  # a ModuleBank, or the LoraWeights of one adapter


@dataclass
class Placement:
    """Where the modules of a bank belong in a model."""

    linears: dict[str, Any] = field(default_factory=dict)  # path -> factors, for layers of their own
    # experts module -> {its parameter: pieces}
    parameters: dict[str, dict[str, list[Piece]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def paths(self) -> Iterable[tuple[str, str, list[Piece]]]:
        """(experts module, parameter, pieces) of each."""
        for experts, parameters in self.parameters.items():
            for parameter, pieces in parameters.items():
                yield experts, parameter, pieces


def place(model: nn.Module, modules: Mapping[str, Any], gates: Iterable[str] = ()) -> Placement:
    """Sorts `modules` ({path: factors}) by what the model has for them; a path without a place stays among `linears`.

    `gates` are the paths of stacked parameters that have gates, each of which must be found.
    """
    found, layers = Placement(), dict(model.named_modules(remove_duplicate=False))
    twins = _without_containers(layers)
    targets: dict[tuple[str, str], tuple[str, str, int] | str | None] = {}
    conversion = None
    refused: dict[str, str] = {}
    moved: dict[str, str] = {}
    for path, factors in modules.items():
        match = None if path in layers else _INDEXED.fullmatch(path)
        if match is None:
            found.linears[path] = factors
            continue
        key = match["experts"], match["leaf"]
        if key not in targets:
            conversion = _Conversion(model) if conversion is None else conversion
            targets[key] = _target(path, *key, layers, conversion, twins)
        target = targets[key]
        if target is not None and (getattr(factors, "branches", None) or not hasattr(factors, "lora_A")):
            target = "it is a part of fused experts, where only LoRA is routed: load_experts(..., modules=...)"
        if target is None:
            found.linears[path] = factors
        elif isinstance(target, str):
            refused.setdefault(match["experts"], target)
        else:
            experts, parameter, rows = target
            if experts != match["experts"] and _bare(experts) == _bare(match["experts"]):
                moved[match["experts"]] = experts
            pieces = found.parameters.setdefault(experts, {}).setdefault(parameter, [])
            pieces.append(Piece(path, int(match["index"]), rows, factors))
    found.problems += [f"module '{path}': {reason}" for path, reason in refused.items()]
    if moved:
        said = listed([f"{old} -> {new}" for old, new in moved.items()], "module")
        found.notes.append(f"the LoRA on fused experts has other names in this model and was renamed: {said}")
    seen: dict[int, str] = {}
    for owner, parameters in found.parameters.items():
        if seen.setdefault(id(layers[owner]), owner) != owner:
            found.problems.append(
                f"modules '{seen[id(layers[owner])]}' and '{owner}' are one; it cannot be routed twice"
            )
            continue
        if reason := why_unsupported(layers[owner]):
            found.problems.append(f"module '{owner}': {reason}")
            continue
        for parameter, pieces in parameters.items():
            found.problems += _sizes_problems(f"{owner}.{parameter}", layers[owner], parameter, pieces)
    known = {name for owner, parameter, pieces in found.paths() for name in gate_names(owner, parameter, pieces)}
    if not found.problems:
        found.problems += [
            f"module '{path}': the experts have gates for it and no LoRA that belongs there"
            for path in set(gates) - known
        ]
    return found


def gate_names(owner: str, parameter: str, pieces: Iterable[Piece]) -> list[str]:
    """The paths that gates of a parameter may go by, the model's first."""
    theirs = (f"{_INDEXED.fullmatch(piece.source)['experts']}.{parameter}" for piece in pieces)
    return list(dict.fromkeys([f"{owner}.{parameter}", *theirs]))


def _bare(path: str) -> tuple[str, ...]:
    return tuple(part for part in bare_path(path).split(".") if part not in CONTAINERS)


def _without_containers(layers: Mapping[str, nn.Module]) -> dict[tuple[str, ...], str]:
    """{parts of a path but for the containers by which classes of one model differ: path}, of stacked experts alone."""
    found: dict[tuple[str, ...], list[str]] = {}
    for path, layer in layers.items():
        if stacked(layer):
            found.setdefault(_bare(path), []).append(path)
    return {parts: paths[0] for parts, paths in found.items() if len(paths) == 1}


class _Conversion:
    """transformers' own renaming of checkpoints of this model."""

    def __init__(self, model: nn.Module):
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        entries = get_model_conversion_mapping(model) if isinstance(model, PreTrainedModel) else []
        self.renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in entries if isinstance(entry, WeightConverter)]

    def __call__(self, key: str) -> tuple[str, list[str], int]:
        """(the key in the model, the keys that became one with it, its place among them)."""
        from transformers.core_model_loading import rename_source_key

        renamed, source = rename_source_key(key, self.renamings, self.converters)
        for converter in self.converters:
            if source in converter.source_patterns:
                return renamed, list(converter.source_patterns), converter.source_patterns.index(source)
        return renamed, [key], 0


def _target(
    path: str,
    experts: str,
    leaf: str,
    layers: Mapping[str, nn.Module],
    conversion: _Conversion,
    twins: Mapping[tuple[str, ...], str],
) -> tuple[str, str, int] | str | None:
    """(experts module, parameter, rows), why there is none, or None for what is no expert of fused experts."""
    renamed, sources, place = conversion(path + ".weight")
    owner, _, parameter = renamed.rpartition(".")
    owner = owner if owner in layers else twins.get(_bare(owner), owner)
    if (module := layers.get(owner)) is not None and parameter in stacked(module):
        if not is_dispatched(module):
            return why_unsupported(module)
        if parameter == "gate_up_proj" and len(sources) == 2:
            return owner, parameter, (GATE, UP)[place]
        if len(sources) == 1:
            return owner, parameter, WHOLE
    # a slice of a parameter, and layers of a model without conversion; the renaming may have moved their parent
    parent = _INDEXED.fullmatch(renamed.removesuffix(".weight"))
    tried = [experts, *([parent["experts"]] if parent else ())]
    for owner in dict.fromkeys([*tried, *(twins[_bare(path)] for path in tried if _bare(path) in twins)]):
        module = layers.get(owner)
        if is_peft_layer(module):
            return carrier_problem(layers[""], owner)
        if module is None or not stacked(module):
            continue
        if not is_dispatched(module):
            return why_unsupported(module)
        parameter, rows = (leaf, WHOLE) if leaf in stacked(module) else _LEAVES.get(leaf, (leaf, WHOLE))
        if parameter not in (first_parameter(module), "down_proj"):
            names = ", ".join((first_parameter(module), "down_proj"))
            return f"{type(module).__name__} has no parameter for the adapter's '{leaf}'; it has {names}"
        return owner, parameter, rows
    return None


def _sizes_problems(path: str, module: nn.Module, parameter: str, pieces: Iterable[Piece]) -> list[str]:
    """Where pieces do not fit the parameter `path`."""
    n, width, out = parameter_sizes(module, parameter)
    problems = []
    for piece in pieces:
        got = piece.factors.in_features, piece.factors.out_features
        rows = out if piece.rows == WHOLE else out // 2
        if piece.index >= n:
            problems.append(f"the experts have a base expert {piece.index}, the model has {n}")
        if piece.rows != WHOLE and not halves_apart(module):
            problems.append(f"its rows alternate between gate and up, and the experts have them apart ({piece.source})")
        elif got != (width, rows) and (piece.rows != WHOLE or got != (rows, width)):
            problems.append(
                f"for each base expert it is D={width} -> O={rows}, the experts are D={got[0]} -> O={got[1]}"
            )
    # what is wrong with every base expert is said once
    return [f"module '{path}': {problem}" for problem in dict.fromkeys(problems)]


class ParameterBank:
    """The LoRA factors of E experts for each of the n base experts of one stacked parameter.

    lora_A [n,E,R,D], lora_B [n,E,O,R] and lora_bias [n,E,O] or None, laid out as in ModuleBank; present [E]: whether an
    expert has a LoRA for any base expert. An expert with LoRAs of gate and up apart holds them side by side along R.
    """

    def __init__(
        self, bank: ExpertBank, owner: str, module: nn.Module, parameter: str, pieces: list[Piece], turned: bool
    ):
        n, width, out = parameter_sizes(module, parameter)
        banks = [(p, _turned(p.factors) if _is_turned(p, width, out, turned) else p.factors) for p in pieces]
        room = {rows: max((b.rank for p, b in banks if p.rows == rows), default=0) for rows in (GATE, UP, WHOLE)}
        first = banks[0][1]
        dtype = first.dtype
        for _, factors in banks:
            dtype = torch.promote_types(dtype, factors.dtype)
        shape = (n, len(bank), sum(room.values()))
        self.lora_A = torch.zeros(n, len(bank), width, shape[2], dtype=dtype, device=first.device).mT
        self.lora_B = torch.zeros(*shape, out, dtype=dtype, device=first.device).mT
        biased = any(factors.lora_bias is not None for _, factors in banks)
        self.lora_bias = torch.zeros(n, len(bank), out, dtype=dtype, device=first.device) if biased else None
        self.present = torch.stack([factors.present for _, factors in banks]).any(0)
        starts = {GATE: 0, UP: room[GATE], WHOLE: room[GATE] + room[UP]}
        columns = {GATE: slice(0, out // 2), UP: slice(out // 2, out), WHOLE: slice(0, out)}
        for piece, factors in banks:
            ranks = slice(starts[piece.rows], starts[piece.rows] + factors.rank)
            self.lora_A[piece.index, :, ranks] = factors.lora_A
            self.lora_B[piece.index, :, columns[piece.rows], ranks] = factors.lora_B
            if factors.lora_bias is not None:
                self.lora_bias[piece.index, :, columns[piece.rows]] += factors.lora_bias
        names = gate_names(owner, parameter, pieces)
        self.gates, self.has_gate = bank.parameter_gates.stack(names, bank.names, width, first.device)

    def of(self, index: int) -> ModuleBank:
        """The experts of base expert j, as if it were a linear layer of its own."""
        rank = self.lora_A.shape[2]
        return ModuleBank(
            self.lora_A[index],
            self.lora_B[index],
            None if self.lora_bias is None else self.lora_bias[index],
            present=self.present,
            # gate and up lie at fixed places along R: no expert is shorter than R
            ranks=[rank if here else 0 for here in self.present.tolist()],
            gates=self.gates,
            has_gate=self.has_gate,
        )

    def __len__(self) -> int:
        return self.lora_A.shape[0]


def with_parameters(model: nn.Module, experts: ExpertBank, placement: Placement) -> tuple[ExpertBank, list[str]]:
    """The bank for `Method.lacks`, and what is wrong with its gates.

    Its linears, and every stacked parameter as a module that has gates and no factors.
    """
    modules, problems = dict(placement.linears), []
    for owner, parameter, pieces in placement.paths():
        _, width, out = parameter_sizes(model.get_submodule(owner), parameter)
        path, device = f"{owner}.{parameter}", pieces[0].factors.device
        try:
            names = gate_names(owner, parameter, pieces)
            gates, has_gate = experts.parameter_gates.stack(names, experts.names, width, device)
        except ValueError as error:
            problems.append(f"module '{path}': {error}")
            continue
        modules[path] = ModuleBank(
            torch.zeros(len(experts), 1, width, device=device, dtype=torch.float32),
            torch.zeros(len(experts), out, 1, device=device, dtype=torch.float32),
            present=torch.stack([piece.factors.present for piece in pieces]).any(0),
            gates=gates,
            has_gate=has_gate,
        )
    return ExpertBank(experts.names, modules, base_model=experts.base_model, folders=experts.folders), problems


def are_turned(module: nn.Module, parameters: Mapping[str, Iterable[Piece]]) -> bool:
    """Whether LoRAs of whole parameters of this module were made for weights O -> D, which a square one cannot tell."""
    return any(
        _is_turned(piece, *parameter_sizes(module, parameter)[1:], False)
        for parameter, pieces in parameters.items()
        for piece in pieces
    )


def _is_turned(piece: Piece, width: int, out: int, if_square: bool) -> bool:
    """PEFT up to 0.18 read a parameter [n,O,D] as [n, in, out]: A and B are then each other's."""
    if piece.rows != WHOLE:
        return False
    return if_square if width == out else (piece.factors.in_features, piece.factors.out_features) == (out, width)


def _turned(factors: ModuleBank) -> ModuleBank:
    return ModuleBank(factors.lora_B.mT, factors.lora_A.mT, present=factors.present, ranks=factors.ranks)
