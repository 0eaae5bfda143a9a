"""ExpertBank: many LoRA experts stacked per module, ready for the kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.safefile import FLOATS
from .formats.peft import GateSet, write_gates
from .kinds import SIGMOID_GATE
from .module_bank import ModuleBank
from .sources import MAX_LISTED, Source, collect_sources, stack_modules

__all__ = ["ExpertBank", "ModuleBank", "load_experts"]


class ExpertBank:
    """E experts over one base model.

    names: the experts, in the order of their ids; modules: {module path: ModuleBank}; base_model: the model
    they all name, or None; folders: where each came from, or None; global_vectors: {kind: {expert name: [any]
    float32}}; global_metadata: {kind: {expert name: {key: text}}}, what the files of those vectors say of them.
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
    ):
        self.names = tuple(names)
        self.modules = dict(modules)
        self.base_model = base_model
        self.folders = tuple(folders) if folders is not None else (None,) * len(self.names)
        self.global_vectors = {kind: dict(vectors) for kind, vectors in (global_vectors or {}).items()}
        self.global_metadata = {kind: dict(facts) for kind, facts in (global_metadata or {}).items()}
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
            f"ExpertBank({len(self)} experts [{names}], {len(self.modules)} modules, rank {span}, "
            f"{', '.join(sorted(where))}, {self.nbytes / 2**20:.1f} MiB, "
            f"gates: {', '.join(self.gate_kinds) or 'none'}, base_model: {self.base_model})"
        )

    @property
    def gate_kinds(self) -> tuple[str, ...]:
        """Every kind of gate or global vector that some expert has."""
        kinds = {kind for module in self.modules.values() for kind in module.gates}
        return tuple(sorted(kinds | set(self.global_vectors)))

    @property
    def nbytes(self) -> int:
        """Bytes of all stacked tensors, padding and gates included."""
        return sum(module.nbytes for module in self.modules.values())

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
                raise ValueError("ExpertBank.to:" + "".join(f"\n  - {problem}" for problem in problems))
        vectors = {
            kind: {name: vector.to(device) for name, vector in rows.items()}
            for kind, rows in self.global_vectors.items()
        }
        return ExpertBank(
            self.names,
            modules,
            base_model=self.base_model,
            folders=self.folders,
            global_vectors=vectors,
            global_metadata=self.global_metadata,
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
        rows = {path: torch.as_tensor(gate).detach().float() for path, gate in gates.items()}
        problems = []
        for path, row in rows.items():
            module = self.modules.get(path)
            if module is None:
                problems.append(f"{path} is not a module of the bank")
            elif tuple(row.shape) != (module.in_features,):
                problems.append(f"{path}: a gate must be [D={module.in_features}], got {list(row.shape)}")
            elif not torch.isfinite(row).all():
                problems.append(f"{path}: the gate holds NaN or infinite values")
            elif not module.present[e]:
                problems.append(f"{path}: expert {self.names[e]!r} has no LoRA here")
        if problems:
            raise ValueError(f"set_gates({self.names[e]!r}): " + "; ".join(problems))
        for path, row in rows.items():
            self.modules[path].set_gate(kind, e, row)
        if global_vector is not None:
            vector = torch.as_tensor(global_vector).detach().float().clone()
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
        }

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
        are set first. Raises ValueError naming every expert that cannot be written, before anything is
        written.
        """
        for name, rows in (gates or {}).items():
            self.set_gates(name, rows, kind)
        targets, problems = self._gate_folders(folders), []
        for name, folder in targets.items():
            if folder is None:
                problems.append(f"expert {name!r} was not loaded from a folder; pass folders={{name: folder}}")
            if not self.get_gates(name, kind) and name not in self.global_vectors.get(kind, {}):
                problems.append(f"expert {name!r} has no gates of kind {kind!r}")
        if problems:
            raise ValueError("save_gates: " + "; ".join(problems))
        written = []
        for name, folder in targets.items():
            folder.mkdir(parents=True, exist_ok=True)
            vector = self.global_vectors.get(kind, {}).get(name)
            rows = self.get_gates(name, kind)
            written.append(
                write_gates(
                    folder,
                    rows,
                    kind=kind,
                    base_model=self.base_model,
                    global_vector=vector,
                    metadata={**self.global_metadata.get(kind, {}).get(name, {}), **(metadata or {})},
                )
            )
        return written

    def _gate_folders(
        self, folders: str | os.PathLike | Mapping[str, str | os.PathLike] | None
    ) -> dict[str, Path | None]:
        if folders is None:
            return dict(zip(self.names, self.folders, strict=True))
        if isinstance(folders, Mapping):
            return {self.names[self._id(name, "save_gates")]: Path(folder) for name, folder in folders.items()}
        parent = Path(folders)
        if len(self) == 1:
            return {self.names[0]: parent}
        unusable = [name for name in self.names if name in (".", "..") or Path(name).name != name]
        if unusable:
            raise ValueError(f"save_gates: {unusable} cannot be folder names; pass folders={{name: folder}}")
        return {name: parent / name for name in self.names}

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
) -> ExpertBank:
    """Load PEFT LoRA adapters as one bank of experts.

    paths: folders or hub ids (see `experts/hub.py`), as a list (names are the folders' names), as {name:
    path}, or one alone; or a PEFT model, whose loaded adapters become the experts (it is left untouched).
    dtype: scaling (alpha/r, or alpha/sqrt(r) with rslora, with the config's patterns) is folded into lora_B and
    lora_bias in float32 before the cast to dtype. None keeps the stored dtype, promoted where experts differ,
    as long as folding is exact: experts stored in 16 bits become float32 (twice the memory) unless every
    scaling that is not 0 is a power of two, and at least 1 for float16. Pass torch.float16 or torch.bfloat16
    to have 16 bits in any case, with lora_B rounded once more.
    device: where the stacked tensors go; None is the CPU.

    Raises ValueError listing every problem of every expert, or why the device cannot be used; then nothing was
    loaded. Warns once, naming the experts, of configs that speak of modules which are not in their files.
    """
    _check_dtype(dtype)
    device = _usable_device("cpu" if device is None else device, "load_experts")
    sources = collect_sources(paths)
    _warn_of_notes(sources)
    modules = stack_modules(sources, dtype, device)
    _place_gates(sources, modules)
    vectors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, dict[str, dict[str, str]]] = {}
    for source in sources:
        for kind, gates in source.gates.items():
            if gates.global_vector is not None:
                vectors.setdefault(kind, {})[source.name] = gates.global_vector.to(device)
                facts.setdefault(kind, {})[source.name] = dict(gates.metadata)
    return ExpertBank(
        [source.name for source in sources],
        modules,
        base_model=_common_base_model(sources),
        folders=[source.folder for source in sources],
        global_vectors=vectors,
        global_metadata=facts,
    )


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in FLOATS.values():
        known = ", ".join(str(known) for known in FLOATS.values())
        raise ValueError(f"dtype must be one of {known} or None, got {dtype!r}")


def _usable_device(device: torch.device | str, caller: str) -> torch.device:
    try:
        found = torch.device(device)
        if found.type != "meta":
            torch.empty(1, device=found)
            return found
        reason = "it holds no values"
    except Exception as error:  # AssertionError, RuntimeError, TypeError, ...: it depends on how torch was built
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise ValueError(f"{caller}: device {device!r} cannot be used ({reason}); pass 'cpu' or a device of this machine")


def _warn_of_notes(sources: Sequence[Source]) -> None:
    notes = [f"expert {source.name!r}: {note}" for source in sources for note in source.notes]
    if len(notes) > MAX_LISTED:
        notes[MAX_LISTED:] = [f"... and {len(notes) - MAX_LISTED} more"]
    if notes:
        warnings.warn("load_experts: " + "".join(f"\n  - {note}" for note in notes), stacklevel=3)


def _place_gates(sources: Sequence[Source], modules: Mapping[str, ModuleBank]) -> None:
    for e, source in enumerate(sources):
        sets: Iterable[GateSet] = source.gates.values()
        for gates in sets:
            for path, gate in gates.gates.items():
                modules[path].set_gate(gates.kind, e, gate)


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
