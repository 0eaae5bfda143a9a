"""The gates sidecar: what routing needs besides a LoRA adapter, in a safetensors file beside it.

Key `<module path>` holds a gate [D] float32, the optional key `__global__` the expert's global vector; the
string metadata are {"format": "moerge-gates", "version": "1", "kind": ..., "base_model": ...}. One file per
kind: `moerge_gates.safetensors` for the first and `moerge_gates.<kind>.safetensors` for further ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import write_atomically
from ..files.safefile import FLOATS, AdapterError, file_inside, open_tensors, path_problem, read_headers, read_tensor
from .parameter_gates import has_slices, is_stacked_parameter

GATES_FILE = "moerge_gates.safetensors"
GLOBAL_KEY = "__global__"
FORMAT, VERSION = "moerge-gates", "1"
_KIND = re.compile(r"[a-z0-9-]{1,64}")
_SIDECAR = re.compile(r"moerge_gates(\.(?P<kind>[a-z0-9-]{1,64}))?\.safetensors")


@dataclass(frozen=True)
class GateSet:
    """The gates of one kind ("sigmoid-gate", "average-activation", ...) of one expert."""

    kind: str
    gates: dict[str, Tensor]  # module path -> [D] float32
    global_vector: Tensor | None = None  # [any] float32
    metadata: dict[str, str] = field(default_factory=dict)


def read_gates(
    folder: str | os.PathLike,
    modules: Mapping[str, int] | None = None,
    keep: Callable[[str], bool] | None = None,
) -> dict[str, GateSet]:
    """{kind: GateSet} of every sidecar in `folder`; empty when there is none.

    `modules` (module path -> D) adds the check that every gate belongs to a module of the adapter and has its
    width; `keep` says for which modules gates are read (None: all). Raises AdapterError with every problem of every
    sidecar.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise AdapterError(["there is no such folder"], f"the gates in {folder} cannot be used")
    found: dict[str, GateSet] = {}
    problems: list[str] = []
    for name in sorted(path.name for path in folder.glob("moerge_gates*.safetensors")):
        try:
            if _SIDECAR.fullmatch(name) is None:
                raise ValueError(f"{name}: expected {GATES_FILE} or moerge_gates.<kind>.safetensors")
            gates = _read_sidecar(folder, name, modules, keep)
        except AdapterError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
            continue
        except (ValueError, OSError) as error:
            problems.append(str(error) if name in str(error) else f"{name}: {error}")
            continue
        if gates.kind in found:
            problems.append(f"{name}: gates of kind {gates.kind!r} stand in another file of the folder as well")
        found[gates.kind] = gates
    if problems:
        raise AdapterError(problems, f"the gates in {folder} cannot be used")
    return found


def read_gates_file(
    file: str | os.PathLike,
    modules: Mapping[str, int] | None = None,
    keep: Callable[[str], bool] | None = None,
) -> dict[str, GateSet]:
    """`read_gates` of one file, whatever its name is."""
    file = Path(file).resolve()
    try:
        gates = _read_sidecar(file.parent, file.name, modules, keep)
    except AdapterError as error:
        raise AdapterError(error.problems, f"the gates in {file} cannot be used") from None
    except (ValueError, OSError) as error:
        raise AdapterError([str(error)], f"the gates in {file} cannot be used") from None
    return {gates.kind: gates}


def _read_sidecar(
    folder: Path, name: str, modules: Mapping[str, int] | None, keep: Callable[[str], bool] | None
) -> GateSet:
    match = _SIDECAR.fullmatch(name)
    with open_tensors(file_inside(folder, name)) as handle:
        metadata = dict(handle.metadata() or {})
        problems = _metadata_problems(metadata, match["kind"] if match else None)
        headers = read_headers(handle)
        if keep is not None:
            taken = {key for key in headers if key == GLOBAL_KEY or keep(key) or has_slices(key, modules or ())}
            headers = {key: header for key, header in headers.items() if key in taken}
        for key, header in headers.items():
            problems += _header_problems(key, header, modules)
        if problems:
            raise AdapterError(problems)
        tensors = {key: read_tensor(handle, key, header).float() for key, header in headers.items()}
    # a finite sum proves that every term is finite
    if tensors and not torch.cat(list(tensors.values())).sum().isfinite():
        problems = [
            f"{key} holds NaN or infinite values (as float32)"
            for key, tensor in tensors.items()
            if not torch.isfinite(tensor).all()
        ]
        if problems:
            raise AdapterError(problems)
    return GateSet(metadata["kind"], tensors, tensors.pop(GLOBAL_KEY, None), metadata)


def _metadata_problems(metadata: Mapping[str, str], kind_in_name: str | None) -> list[str]:
    problems = []
    for key, expected in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(key) != expected:
            problems.append(f"metadata {key!r} must be {expected!r}, got {str(metadata.get(key))[:80]!r}")
    kind = metadata.get("kind", "")
    if not _KIND.fullmatch(kind):
        problems.append(f"metadata 'kind' must be [a-z0-9-]+, got {kind[:80]!r}")
    elif kind_in_name is not None and kind != kind_in_name:
        problems.append(f"the file's name says kind {kind_in_name!r}, its metadata {kind!r}")
    return problems


def _header_problems(key: str, header, modules: Mapping[str, int] | None) -> list[str]:
    if key != GLOBAL_KEY and (why := path_problem(key)):
        return [why]
    problems = []
    if header.dtype not in FLOATS:
        problems.append(f"{key} must be a float tensor, got {header.dtype}")
    if len(header.shape) != 1 or 0 in header.shape:
        problems.append(f"{key} must be a vector, got shape {list(header.shape)}")
    elif modules is not None and key != GLOBAL_KEY:
        if key not in modules and is_stacked_parameter(key, modules):
            return problems  # its width is the model's to know
        if key not in modules:
            problems.append(f"{key}: a gate for a module without LoRA weights in this adapter")
        elif header.shape[0] != modules[key]:
            problems.append(f"the gate of {key} must be [D={modules[key]}], got {list(header.shape)}")
    return problems


def write_gates(
    folder: str | os.PathLike,
    gates: Mapping[str, Tensor],
    *,
    kind: str,
    base_model: str | None = None,
    global_vector: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one kind of gates (module path -> [D]) beside an adapter, as float32; returns the file's path.

    The file of that kind is replaced as a whole, in one step: a reader sees the old one or the new one. When
    `moerge_gates.safetensors` holds another kind, the gates go to `moerge_gates.<kind>.safetensors`.
    `metadata` are further strings for the header. Raises AdapterError (a ValueError) for gates that could not
    be read back.
    """
    folder = Path(folder)
    tensors = dict(gates)
    if global_vector is not None:
        tensors[GLOBAL_KEY] = global_vector
    problems = [] if _KIND.fullmatch(kind) else [f"kind must be [a-z0-9-]+, got {kind!r}"]
    if not folder.is_dir():
        problems.append("there is no such folder")
    header = {str(key): str(value) for key, value in (metadata or {}).items()}
    if base_model is not None:
        header["base_model"] = base_model
    header |= {"format": FORMAT, "version": VERSION, "kind": kind}
    problems += _value_problems(tensors)
    if problems:
        raise AdapterError(problems, f"gates cannot be written to {folder}")
    # a clone each: safetensors refuses tensors that share storage
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous().clone() for key, value in tensors.items()}
    path = gates_file(folder, kind)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    return path


def _value_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if not tensors:
        problems.append("there is neither a gate nor a global vector")
    for key, value in tensors.items():
        if key != GLOBAL_KEY and (why := path_problem(key)):
            problems.append(why)
        elif not isinstance(value, Tensor) or value.ndim != 1 or value.numel() == 0:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            problems.append(f"{key} must be a vector [D], got {got}")
        elif not value.is_floating_point() or not torch.isfinite(value.detach().float()).all():
            problems.append(f"{key} must hold finite floats")
    return problems


def gates_file(folder: Path, kind: str) -> Path:
    """The file in `folder` that holds the gates of `kind`, or would."""
    own = folder / f"moerge_gates.{kind}.safetensors"
    first = folder / GATES_FILE
    if own.exists() or not first.exists():
        return own if own.exists() else first
    with open_tensors(file_inside(folder.resolve(), GATES_FILE)) as handle:
        return first if (handle.metadata() or {}).get("kind") == kind else own
