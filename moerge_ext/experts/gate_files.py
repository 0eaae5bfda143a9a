"""Gates of a bank's experts in files: read from elsewhere than beside the adapters, and written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.safefile import AdapterError, file_inside, in_hub_cache, open_tensors
from .fingerprint import ADAPTER_KEY, NAME_KEY, fingerprint, note_of_file
from .formats import inspect_adapter
from .formats.peft import write_gates
from .gates import read_gates, read_gates_file
from .hub import find_files

INDEX_FILES = "moerge_examples*.safetensors"
Gates = Mapping[str, str | os.PathLike] | None


def gate_places(gates: Gates, names: list[str], *, complete: bool = True) -> dict[str, Path]:
    """{expert: folder or file} of the argument `gates` of `load_experts`; ValueError for what is not there, or, when
    `names` are `complete`, for gates of other experts.
    """
    if gates is None:
        return {}
    if not isinstance(gates, Mapping):
        raise ValueError(f"load_experts: gates must be {{expert name: folder or file}}, got {type(gates).__name__}")
    problems, found = [], {}
    for name, place in gates.items():
        if name not in names:
            if complete:
                problems.append(f"gates for {name!r}, which is no expert here; there are {', '.join(names)}")
            continue
        try:
            found[name] = find_files(place)
        except ValueError as error:
            problems.append(f"gates of {name!r}: {error}")
    if problems:
        raise ValueError("load_experts: " + "; ".join(problems))
    return found


def with_gates(source: Any, place: Path, keep: Callable[[str], bool] | None, whole: Callable[[], Any]) -> Any:
    """The source with the gates of `place` in place of its own of the same kinds.

    whole: the same source with all its modules, whatever `keep` takes. AdapterError for gates that cannot be used, or
    that were made for another adapter.
    """
    widths = {path: module.in_features for path, module in source.modules.items()}
    read = read_gates if place.is_dir() else read_gates_file
    found = read(place, widths, keep)
    made = {f"{kind} gates": gates.metadata for kind, gates in found.items()} | _indices(place)
    if not made:
        raise AdapterError([f"there are neither gates nor indexed examples in {place}"])
    own = None
    if any(ADAPTER_KEY in metadata for metadata in made.values()):
        try:
            own = fingerprint(whole().read())
        except ValueError:  # of the part that is not taken; one that is taken is found to be wrong as ever
            source.notes.append(f"whether the gates in {place} are its own is not known: the rest of it is not right")
    problems = [text for what, metadata in made.items() if (text := _foreign(source, what, metadata, own, place))]
    if problems:
        raise AdapterError(problems)
    return replace(source, gates={**source.gates, **found})


def global_parts(
    sources: Iterable[Any], device: torch.device
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, dict[str, str]]]]:
    """({kind: {expert: its global vector}}, {kind: {expert: what its file says of gates and vector}})."""
    vectors: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, dict[str, dict[str, str]]] = {}
    for source in sources:
        for kind, gates in source.gates.items():
            facts.setdefault(kind, {})[source.name] = dict(gates.metadata)
            if gates.global_vector is not None:
                vectors.setdefault(kind, {})[source.name] = gates.global_vector.to(device)
    return vectors, facts


def _indices(folder: Path) -> dict[str, dict[str, str]]:
    """{what it is: its header's entries} of the indices of examples in a folder; whoever uses one checks the rest."""
    found = {}
    for file in sorted(folder.glob(INDEX_FILES)):
        try:
            with open_tensors(file_inside(folder.resolve(), file.name)) as opened:
                found[f"examples of {file.name}"] = dict(opened.metadata() or {})
        except ValueError as error:
            raise AdapterError([str(error)]) from None
    return found


def _foreign(source: Any, what: str, metadata: Mapping[str, str], own: str | None, place: Path) -> str | None:
    """What to say of gates that were made for another adapter than `source`, whose fingerprint is `own`."""
    made, base = metadata.get(ADAPTER_KEY), metadata.get("base_model")
    if made is not None:
        if own is None or made == own:
            return None
    elif not base or not source.base_model or _last(base) == _last(source.base_model):
        return None
    for_whom = f"adapter {metadata[NAME_KEY]!r}" if NAME_KEY in metadata else "an adapter"
    on = f" on {base!r}" if base else ""
    mine = f" (on {source.base_model!r})" if source.base_model else ""
    return (
        f"the {what} in {place} were made for {for_whom}{on}, which is not this one{mine}: make them for it, as by "
        "`moerge train-gates MODEL ADAPTER --output DIR`"
    )


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2].lower()


def stale_note(source: Any, whole: Callable[[], Any]) -> str | None:
    """What to say of gates beside an adapter whose weights have changed since."""
    if not has_noted_gates(source):
        return None
    try:
        return stale_note_of(source, fingerprint(whole().read()))
    except ValueError:  # what is wrong with the part that is not taken is no news
        return None


def has_noted_gates(source: Any) -> bool:
    """Whether gates beside an adapter say for which weights they were made."""
    return any(ADAPTER_KEY in gates.metadata for gates in source.gates.values())


def stale_note_of(source: Any, own: str) -> str | None:
    """`stale_note` of an adapter whose fingerprint is known."""
    noted = {kind: gates.metadata[ADAPTER_KEY] for kind, gates in source.gates.items() if ADAPTER_KEY in gates.metadata}
    stale = [kind for kind, made in noted.items() if made != own]
    if not stale:
        return None
    own_names = {None, source.name, source.folder.name if source.folder is not None else None}
    named = {source.gates[kind].metadata.get(NAME_KEY) for kind in stale} - own_names
    whose = f" (those of {' and '.join(sorted(map(repr, named)))}, says the file)" if named else ""
    return (
        f"its {', '.join(stale)} gates were made for other weights than the adapter has{whose}: make them again "
        "(`moerge train-gates`, `moerge describe`, with --overwrite)"
    )


def save_gates(
    bank: Any,
    folders: str | os.PathLike | Mapping[str, str | os.PathLike] | None,
    kind: str,
    metadata: Mapping[str, str] | None,
) -> list[Path]:
    """`ExpertBank.save_gates`, once all gates are set."""
    targets, problems = _gate_folders(bank, folders), []
    for name, folder in targets.items():
        if folder is None:
            problems.append(f"expert {name!r} was not loaded from a folder; pass folders={{name: folder}}")
        elif in_hub_cache(folder):
            problems.append(f"expert {name!r} is of the hub's cache; pass folders={{name: folder}}")
        if not bank.get_gates(name, kind) and name not in bank.global_vectors.get(kind, {}):
            problems.append(f"expert {name!r} has no gates of kind {kind!r}")
    if problems:
        raise ValueError("save_gates: " + "; ".join(problems))
    written = []
    for name, folder in targets.items():
        folder.mkdir(parents=True, exist_ok=True)
        e = bank.names.index(name)
        stored = bank.stored_paths[e]
        rows: dict[str, Tensor] = {stored.get(path, path): gate for path, gate in bank.get_gates(name, kind).items()}
        facts = {**bank.global_metadata.get(kind, {}).get(name, {}), **_note_of_folder(name, bank.folders[e])}
        written.append(
            write_gates(
                folder,
                rows,
                kind=kind,
                base_model=bank.bases[e][0],
                global_vector=bank.global_vectors.get(kind, {}).get(name),
                metadata={**facts, **(metadata or {})},
            )
        )
    return written


def _note_of_folder(name: str, folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    try:
        return note_of_file(inspect_adapter(name, folder))
    except AdapterError:  # of a format that is read with the base alone, or a part of it is not right
        return {}


def _gate_folders(
    bank: Any, folders: str | os.PathLike | Mapping[str, str | os.PathLike] | None
) -> dict[str, Path | None]:
    if folders is None:
        return dict(zip(bank.names, bank.folders, strict=True))
    if isinstance(folders, Mapping):
        return {bank.names[bank._id(name, "save_gates")]: Path(folder) for name, folder in folders.items()}
    parent = Path(folders)
    if len(bank) == 1:
        return {bank.names[0]: parent}
    unusable = [name for name in bank.names if name in (".", "..") or Path(name).name != name]
    if unusable:
        raise ValueError(f"save_gates: {unusable} cannot be folder names; pass folders={{name: folder}}")
    return {name: parent / name for name in bank.names}
