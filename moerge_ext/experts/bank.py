"""ExpertBank: many LoRA experts stacked per module, ready for the kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files.counting import counted
from ..files.listing import grouped, listed
from ..files.safefile import FLOATS
from .claims import BaseClaims
from .formats.peft import GateSet
from .gate_files import Gates, global_parts, save_gates
from .idle import idle_notes
from .kinds import PROMPT_KEY, SIGMOID_GATE
from .module_bank import ModuleBank
from .parameter_gates import ParameterGates, is_stacked_parameter, parameter_gate_problems
from .selection import Modules, Rename, Selection
from .sources import MAX_LISTED, Source, collect_sources, stack_modules

__all__ = ["ExpertBank", "ModuleBank", "load_experts"]


class ExpertBank:
    """E experts over one base model.

    names: the experts, in the order of their ids; modules: {module path: ModuleBank}; base_model: the model
    they all name, or None; folders: where each came from, or None; sidecars: {expert name: the other folder or file
    that its gates are from}; global_vectors: {kind: {expert name: [any]
    float32}}; global_metadata: {kind: {expert name: {key: text}}}, what the files of gates and vectors say of them;
    parameter_gates: those of stacked parameters, whose LoRA lies in one module per base expert.
    claims: {expert name: what it says of the base}, checked by `patch`;
    stored_paths: per expert {module path: path in its folder}, where they differ; bases: per expert the (name,
    revision) of the model it says it was trained on.
    """

    def __init__(
        self,
        names: Sequence[str],
        modules: Mapping[str, ModuleBank],
        *,
        base_model: str | None = None,
        folders: Sequence[Path | None] | None = None,
        global_vectors: Mapping[str, Mapping[str, Tensor]] | None = None,
        global_metadata: Mapping[str, Mapping[str, Mapping[str, str]]] | None = None,
        parameter_gates: ParameterGates | None = None,
        claims: Mapping[str, BaseClaims] | None = None,
        stored_paths: Sequence[Mapping[str, str]] | None = None,
        bases: Sequence[tuple[str | None, str | None]] | None = None,
        sidecars: Mapping[str, Path] | None = None,
    ):
        self.names = tuple(names)
        self.modules = dict(modules)
        self.base_model = base_model
        self.folders = tuple(folders) if folders is not None else (None,) * len(self.names)
        self.global_vectors = {kind: dict(vectors) for kind, vectors in (global_vectors or {}).items()}
        self.sidecars = dict(sidecars or {})
        self.claims = dict(claims or {})
        self.global_metadata = {kind: dict(facts) for kind, facts in (global_metadata or {}).items()}
        self.parameter_gates = parameter_gates or ParameterGates()
        self._gated: dict[str, frozenset[int]] = {}  # of `gated`, which large models ask once a module
        self.stored_paths = tuple(map(dict, stored_paths)) if stored_paths is not None else ({},) * len(self.names)
        self.bases = tuple(bases) if bases is not None else ((base_model, None),) * len(self.names)
        problems = []
        if len(set(self.names)) != len(self.names):
            problems.append(f"expert names must be distinct, got {list(self.names)}")
        if len(self.folders) != len(self.names):
            problems.append(f"expected {len(self.names)} folders, got {len(self.folders)}")
        problems += [
            f"{path} holds {module.num_experts} experts, expected {len(self.names)}"
            for path, module in self.modules.items()
            if module.num_experts != len(self.names)
        ]
        if problems:
            raise ValueError("ExpertBank: " + "; ".join(problems))

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        names = ", ".join(self.names[:4]) + (f", ... {len(self) - 4} more" if len(self) > 4 else "")
        ranks = sorted({rank for module in self.modules.values() for rank in module.ranks if rank})
        span = "-".join(str(rank) for rank in dict.fromkeys((ranks[0], ranks[-1]))) if ranks else "none"
        where = {f"{module.dtype} on {module.device}" for module in self.modules.values()}
        return (
            f"ExpertBank({counted(len(self), 'expert')} [{names}], {counted(len(self.modules), 'module')}, "
            f"rank {span}, {', '.join(sorted(where))}, {self.nbytes / 2**20:.1f} MiB, "
            f"gates: {', '.join(self.gate_kinds) or 'none'}, base_model: {self.base_model})"
        )

    @property
    def gate_kinds(self) -> tuple[str, ...]:
        """Every kind of gate or global vector that some expert has."""
        kinds = {kind for module in self.modules.values() for kind in module.gates}
        return tuple(sorted(kinds | set(self.global_vectors) | set(self.parameter_gates)))

    def gated(self, kind: str) -> frozenset[int]:
        """Ids of the experts that have a gate of `kind` in some module."""
        if kind not in self._gated:
            flags = [module.has_gate[kind] for module in self.modules.values() if kind in module.has_gate]
            found = torch.stack(flags).any(0).nonzero().flatten().tolist() if flags else []
            self._gated[kind] = frozenset(found) | set(map(self.names.index, self.parameter_gates.experts(kind)))
        return self._gated[kind]

    @property
    def nbytes(self) -> int:
        """Bytes of all stacked tensors, padding and gates included."""
        return sum(module.nbytes for module in self.modules.values())

    def places(self, name: str) -> list[Path]:
        """Where what routing needs of one expert may lie: the folder or file of `load_experts(gates=...)`, its own."""
        return [place for place in (self.sidecars.get(name), self.folders[self.index(name)]) if place is not None]

    def index(self, name: str) -> int:
        """The id of an expert; KeyError lists the names there are."""
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(f"no expert {name!r}; there are {', '.join(self.names)}") from None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ExpertBank:
        """A new bank on `device`, its LoRA tensors in `dtype` (gates stay float32).

        ValueError names every expert and module whose values do not fit the new dtype, and refuses a device
        that cannot be used.
        """
        _check_dtype(dtype)
        device = None if device is None else _usable_device(device, "ExpertBank.to")
        modules = {path: module.to(device, dtype) for path, module in self.modules.items()}
        if dtype is not None:
            problems = [
                f"expert {self.names[e]!r}, {path}: values do not fit {dtype}"
                for path, module in modules.items()
                for e in module.overflows(self.modules[path])
            ]
            if problems:
                raise ValueError("ExpertBank.to:" + "".join(f"\n  - {problem}" for problem in grouped(problems)))
        vectors = {
            kind: {name: vector.to(device) for name, vector in rows.items()}
            for kind, rows in self.global_vectors.items()
        }
        moved = self.with_modules(modules, self.stored_paths)
        moved.global_vectors = vectors
        moved.parameter_gates = self.parameter_gates.to(device)
        return moved

    def with_modules(self, modules: Mapping[str, ModuleBank], stored_paths: Sequence[Mapping[str, str]]) -> ExpertBank:
        """The same experts with other modules."""
        return ExpertBank(
            self.names,
            modules,
            base_model=self.base_model,
            folders=self.folders,
            global_vectors=self.global_vectors,
            global_metadata=self.global_metadata,
            parameter_gates=self.parameter_gates,
            claims=self.claims,
            stored_paths=stored_paths,
            bases=self.bases,
            sidecars=self.sidecars,
        )

    def set_gates(
        self,
        expert: str | int,
        gates: Mapping[str, Tensor],
        kind: str = SIGMOID_GATE,
        global_vector: Tensor | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Set gates of one expert in memory: {module path: [D]}. Modules that are not named keep theirs.

        `metadata` says of `global_vector` what its file would ("instruction", "embedder", ...).
        A model that was patched with this bank before keeps the gates it was patched with. Raises ValueError
        with every problem (unknown expert, unknown module, expert without LoRA there, wrong width, NaN) before
        anything is set.
        """
        e = self._id(expert, "set_gates")
        rows = {path: _as_tensor(gate).detach().float() for path, gate in gates.items()}
        problems, unknown = [], []
        for path, row in rows.items():
            module = self.modules.get(path)
            if module is None and is_stacked_parameter(path, self.modules):
                problems += parameter_gate_problems(path, row)
            elif module is None:
                unknown.append(path)
            elif tuple(row.shape) != (module.in_features,):
                problems.append(f"{path}: a gate must be [D={module.in_features}], got {list(row.shape)}")
            elif not torch.isfinite(row).all():
                problems.append(f"{path}: the gate holds NaN or infinite values")
            elif not module.present[e]:
                problems.append(f"{path}: expert {self.names[e]!r} has no LoRA here")
        if unknown:
            is_none = "is not a module" if len(unknown) == 1 else "are not modules"
            problems.insert(0, f"{listed(unknown)} {is_none} of the bank")
        if problems:
            raise ValueError(f"set_gates({self.names[e]!r}): " + "; ".join(grouped(problems)))
        for path, row in rows.items():
            if path in self.modules:
                self.modules[path].set_gate(kind, e, row)
            else:
                self.parameter_gates.set(kind, path, self.names[e], row)
        self._gated.clear()
        if rows:  # what is noted of a prompt is of the gates before
            for key in (PROMPT_KEY, "base_model"):
                self.global_metadata.get(kind, {}).get(self.names[e], {}).pop(key, None)
        if global_vector is not None:
            vector = _as_tensor(global_vector).detach().float().clone()
            self.global_vectors.setdefault(kind, {})[self.names[e]] = vector
            self.global_metadata.setdefault(kind, {})[self.names[e]] = dict(metadata or {})

    def get_gates(self, expert: str | int, kind: str = SIGMOID_GATE) -> dict[str, Tensor]:
        """{module path: [D] float32} of one expert, the modules that have a gate; may be empty.

        ValueError for an unknown expert.
        """
        e = self._id(expert, "get_gates")
        return {
            path: module.gates[kind][e]
            for path, module in self.modules.items()
            if kind in module.gates and module.has_gate[kind][e]
        } | self.parameter_gates.of_expert(kind, self.names[e])

    def save_gates(
        self,
        folders: str | os.PathLike | Mapping[str, str | os.PathLike] | None = None,
        *,
        kind: str = SIGMOID_GATE,
        gates: Mapping[str, Mapping[str, Tensor]] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Path]:
        """Write the gates of `kind` beside the adapters and return the files' paths.

        folders: None writes each expert's gates into the folder it was loaded from; {name: folder} writes
        only those experts; one path is the expert's folder when the bank has one expert, and otherwise the
        parent of one folder per expert, named after it and made when missing. `gates` ({name: {module: [D]}})
        are set first. Raises ValueError naming every expert that cannot be written (its adapter is of the hub's
        cache), before anything is written.
        """
        for name, rows in (gates or {}).items():
            self.set_gates(name, rows, kind)
        return save_gates(self, folders, kind, metadata)

    def _id(self, expert: str | int, caller: str) -> int:
        if expert in self.names:
            return self.names.index(expert)
        if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < len(self):
            return expert
        known = ", ".join(self.names)
        raise ValueError(f"{caller}: no expert {expert!r}; expected 0 .. {len(self) - 1} or one of {known}")


def load_experts(
    paths: str | os.PathLike | Iterable[str | os.PathLike] | Mapping[str, str | os.PathLike] | nn.Module,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    base: Any = None,
    names: Iterable[str] | None = None,
    modules: Modules = None,
    rename: Rename = None,
    gates: Gates = None,
) -> ExpertBank:
    """Load LoRA adapters (PEFT, MLX-LM, llama.cpp's GGUF; see `experts.formats`) as one bank of experts.

    paths: folders, GGUF files or hub ids (see `experts/hub.py`), as a list (names are the folders' names), as
    {name: path}, or one alone; or a PEFT model, whose loaded adapters become the experts (it is left untouched).
    dtype: scaling (alpha/r, or alpha/sqrt(r) with rslora, with the config's patterns) is folded into lora_B and
    lora_bias in float32 before the cast to dtype. None keeps the stored dtype, promoted where experts differ,
    as long as folding is exact: experts stored in 16 bits become float32 (twice the memory) unless every
    scaling that is not 0 is a power of two, and at least 1 for float16. Pass torch.float16 or torch.bfloat16
    to have 16 bits in any case, with lora_B rounded once more.
    device: where the stacked tensors go; None is the CPU.
    base: the base model, its config, or the folder or hub id of either: for GGUF adapters of Llama-like models, whose
    rows of q and k are put back in Hugging Face's order with the number of heads.
    names: which experts to take of those in `paths`, in this order; None takes all.
    modules: which modules to take: a regular expression that is searched for in the adapter's own module path (anchor
    it with ^ and $), or a function of the path. What is not taken is not checked either.
    rename: what the modules are called here: {old: new}, where `old` is any run of whole parts of a path
    ("model.layers", "query", a whole path; "" is the start of every path), or a function of the path. `patch` knows
    the renamings of transformers by itself.
    gates: {expert name: folder, file or hub id} of gates (and indexed examples) that lie elsewhere than beside the
    adapter; they take the place of its own of the same kind. They must be those of this adapter: their headers note
    which one they were made for.

    Raises ValueError listing every problem of every expert, what does not fit into memory, or why the device cannot be
    used; then nothing was loaded. Warns once, naming the experts, of configs that speak of modules which are not in
    their files, of experts that change nothing, of adapters of a live model that may be no experts, and of gates beside
    an adapter whose weights have changed since.
    """
    selection = Selection(modules, rename, names)
    _check_dtype(dtype)
    device = _usable_device("cpu" if device is None else device, "load_experts")
    sources, places = collect_sources(paths, selection, base, gates)
    stacked = stack_modules(sources, dtype, device, whole=selection.keeps is None)
    parameter_gates = _place_gates(sources, stacked)
    notes = [f"expert {source.name!r}: {note}" for source in sources for note in source.notes]
    _warn_of_notes(notes + idle_notes([source.name for source in sources], stacked))
    vectors, facts = global_parts(sources, device)
    return ExpertBank(
        [source.name for source in sources],
        stacked,
        base_model=_common_base_model(sources),
        folders=[source.folder for source in sources],
        global_vectors=vectors,
        global_metadata=facts,
        parameter_gates=parameter_gates,
        claims={source.name: source.claims for source in sources},
        stored_paths=[getattr(source, "stored_paths", {}) for source in sources],
        bases=[(source.base_model, getattr(source, "config", {}).get("revision")) for source in sources],
        sidecars=places,
    )


def _as_tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float32, device="cpu")


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS.values():
        known = ", ".join(str(known) for known in FLOATS.values())
        raise ValueError(f"dtype must be one of {known} or None, got {dtype!r}")


def _usable_device(device: torch.device | str, caller: str) -> torch.device:
    try:
        found = torch.device(device)
        if found.type != "meta":
            torch.empty(1, device=found, dtype=torch.float32)
            return found
        reason = "it holds no values"
    except Exception as error:  # AssertionError, RuntimeError, TypeError, ...: it depends on how torch was built
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise ValueError(f"{caller}: device {device!r} cannot be used ({reason}); pass 'cpu' or a device of this machine")


def _warn_of_notes(notes: list[str]) -> None:
    if len(notes) > MAX_LISTED:
        notes[MAX_LISTED:] = [f"... and {len(notes) - MAX_LISTED} more"]
    if notes:
        warnings.warn("load_experts: " + "".join(f"\n  - {note}" for note in notes), stacklevel=3)


def _place_gates(sources: Sequence[Source], modules: Mapping[str, ModuleBank]) -> ParameterGates:
    """Gives the modules their gates; returns those of stacked parameters."""
    rest = ParameterGates()
    rows: dict[tuple[str, str], dict[int, Tensor]] = {}  # {(module path, kind): {expert: gate}}
    for e, source in enumerate(sources):
        sets: Iterable[GateSet] = source.gates.values()
        for gates in sets:
            for path, gate in gates.gates.items():
                if path in modules:
                    rows.setdefault((path, gates.kind), {})[e] = gate
                else:
                    rest.set(gates.kind, path, source.name, gate)
    for (path, kind), found in rows.items():
        modules[path].set_gates(kind, found)
    return rest


def _common_base_model(sources: Sequence[Source]) -> str | None:
    named = {source.base_model for source in sources if source.base_model}
    if len(named) > 1:
        # the same model has many spellings (a local path, a hub id), so this alone is no error
        warnings.warn(
            f"the experts name different base models: {', '.join(sorted(named))}; make sure they are the same",
            stacklevel=3,
        )
        return None
    return next(iter(named), None)
