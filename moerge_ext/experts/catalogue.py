"""What adapters lie in folders, and what there is for routing beside each: `moerge list`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..files.listing import grouped
from ..files.safefile import AdapterError, file_inside, open_tensors
from .fingerprint import NAME_KEY
from .formats import format_of, inspect_adapter
from .formats.peft import CONFIG_FILE, AdapterHeader
from .gate_files import INDEX_FILES, stale_note
from .gates import GateSet, read_gates
from .hub import GGUF, find_adapter
from .kinds import INSTRUCTION
from .manifest import manifest_problems
from .prompt_notes import noted_prompts

ADAPTER_FILES = (CONFIG_FILE, "adapter_model*", "adapters.safetensors", "adapters.npz")
GATES_ONLY = "gates alone"
SIDECARS = ("moerge_gates*.safetensors", INDEX_FILES)
ANY_FILES = (*ADAPTER_FILES, *SIDECARS, f"*{GGUF}")


@dataclass(frozen=True)
class Entry:
    """One adapter, or folder of gates for one that lies elsewhere; `problem` says why it cannot be used.

    ranks: those of its modules, each once; modules: how many; layers: the last parts of their names; size: bytes of its
    files; gates: {kind: how many modules have one}; indices: embedders whose index of examples is there; instruction:
    what it is described with; prompts: the formats it was trained with; made_for: the adapter of gates alone; notes:
    what is odd about it.
    """

    name: str
    path: str
    format: str | None = None
    problem: str | None = None
    base_model: str | None = None
    ranks: list[int] = field(default_factory=list)
    modules: int = 0
    layers: list[str] = field(default_factory=list)
    size: int = 0
    gates: dict[str, int] = field(default_factory=dict)
    indices: list[str] = field(default_factory=list)
    instruction: str | None = None
    prompts: list[str] = field(default_factory=list)
    made_for: str | None = None
    notes: list[str] = field(default_factory=list)


def catalogue(places: Iterable[str | os.PathLike]) -> list[Entry]:
    """One entry for each of `places` (folders, GGUF files, hub ids); of a folder without an adapter, for each of the
    folders and GGUF files in it that have something of one. No tensor of a LoRA is read whole.
    """
    entries = []
    for place in places:
        try:
            name, path = find_adapter(place)
        except ValueError as error:
            entries.append(Entry(str(place), str(place), problem=str(error)))
            continue
        try:
            inside = [] if path.is_file() or _is_one(path) else sorted(_inside(path))
        except OSError as error:
            entries.append(Entry(name, str(path), problem=f"it cannot be looked into ({error.strerror or error})"))
            continue
        entries += [_entry(file.name.removesuffix(GGUF), file) for file in inside] or [_entry(name, path)]
    return entries


def _inside(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        for entry in found:
            path = Path(entry.path)
            if entry.name.startswith("."):
                continue
            if path.suffix == GGUF if path.is_file() else path.is_dir() and _has(path, ANY_FILES):
                yield path


def _is_one(folder: Path) -> bool:
    """Whether a folder is an adapter, or gates of one, and no folder of several."""
    return _has(folder, ADAPTER_FILES + SIDECARS) or len(list(folder.glob(f"*{GGUF}"))) == 1


def _has(folder: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _entry(name: str, path: Path) -> Entry:
    try:
        if path.is_dir() and not _has(path, (*ADAPTER_FILES, f"*{GGUF}")) and _has(path, SIDECARS):
            return _gates_alone(name, path)
        header = inspect_adapter(name, path)
        return _adapter(header, path)
    except AdapterError as error:
        return Entry(name, str(path), problem="; ".join(grouped(error.problems)))
    except (ValueError, OSError) as error:
        return Entry(name, str(path), problem=str(error))


def _adapter(header: AdapterHeader, path: Path) -> Entry:
    folder = header.folder
    notes = list(header.notes)
    notes += [note] if (note := stale_note(header, lambda: header)) else []
    return Entry(
        header.name,
        str(path),
        format=format_of(path),
        base_model=header.base_model,
        ranks=sorted({module.rank for module in header.modules.values()}),
        modules=len(header.modules),
        layers=sorted({module.rpartition(".")[2] for module in header.modules}),
        size=_size(path, ANY_FILES),
        notes=notes + (manifest_problems(folder) if folder is not None else []),
        **(_beside(folder, header.gates) if folder is not None else {}),
    )


def _gates_alone(name: str, folder: Path) -> Entry:
    gates = read_gates(folder)
    bases = {kind.metadata.get("base_model") for kind in gates.values()} - {None}
    made_for = {kind.metadata.get(NAME_KEY) for kind in gates.values()} - {None}
    return Entry(
        name,
        str(folder),
        format=GATES_ONLY,
        base_model=", ".join(sorted(bases)) or None,
        modules=max((len(kind.gates) for kind in gates.values()), default=0),
        size=_size(folder, SIDECARS),
        made_for=", ".join(sorted(made_for)) or None,
        notes=manifest_problems(folder),
        **_beside(folder, gates),
    )


def _beside(folder: Path, gates: dict[str, GateSet]) -> dict[str, object]:
    described = gates.get(INSTRUCTION)
    return {
        "gates": {kind: len(found.gates) for kind, found in gates.items()},
        "indices": index_embedders(folder),
        "instruction": described.metadata.get("instruction") if described is not None else None,
        "prompts": [str(form) for form in dict.fromkeys(noted_prompts(folder).values())],
    }


def index_embedders(folder: Path) -> list[str]:
    """The embedders whose indices of examples lie in a folder; ValueError for a file that cannot be read."""
    found = []
    for file in sorted(folder.glob(INDEX_FILES)):
        with open_tensors(file_inside(folder.resolve(), file.name)) as opened:
            found.append((opened.metadata() or {}).get("embedder", "not named"))
    return found


def _size(path: Path, patterns: Iterable[str]) -> int:
    files = {path} if path.is_file() else {file for pattern in patterns for file in path.glob(pattern)}
    return sum(file.stat().st_size for file in files if file.is_file())
