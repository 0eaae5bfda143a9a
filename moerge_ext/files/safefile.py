"""Opening files that we do not trust: inside their folder, regular, and only through the safetensors
library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

# safetensors' names of the dtypes an adapter may have
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
MAX_PATH = 512  # characters of a module path
MAX_SHOWN = 50  # problems listed for one adapter; the rest are counted


class AdapterError(ValueError):
    """One or more adapters cannot be used. `problems` holds every reason; the message lists them all."""

    def __init__(self, problems: Sequence[str], heading: str = "the adapter cannot be used"):
        self.problems = list(problems)
        shown = self.problems[:MAX_SHOWN]
        if len(self.problems) > MAX_SHOWN:
            shown.append(f"... and {len(self.problems) - MAX_SHOWN} more problems")
        super().__init__(heading + ":" + "".join(f"\n  - {problem}" for problem in shown))

    def __reduce__(self):  # the message is not the first argument, which is what pickle would pass
        return _restore_error, (self.problems, self.args)


def _restore_error(problems: list[str], args: tuple) -> AdapterError:
    error = AdapterError(problems)
    error.args = args
    return error


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 1)


def file_inside(folder: Path, name: str) -> Path:
    """The resolved path of regular file `name` of `folder`; `folder` must be resolved.

    ValueError when it is missing, not a regular file, or a link that leaves the folder. Links of the Hugging
    Face cache (`<repo>/snapshots/<revision>/... -> <repo>/blobs/<hash>`) stay inside their repository and are
    fine.
    """
    try:
        path = (folder / name).resolve(strict=True)
        regular = path.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise ValueError(f"{name} is missing or unreadable ({type(error).__name__})") from None
    if not path.is_relative_to(folder) and path.parent != _hub_blobs(folder):
        raise ValueError(f"{name} is a link out of its folder, to {path}; copy the file into the folder")
    if not regular:
        raise ValueError(f"{name} must be a regular file")
    return path


def _hub_blobs(folder: Path) -> Path | None:
    """The blobs folder that belongs to a snapshot (or a folder inside one) of the Hugging Face cache."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent / "blobs"
    return None


@contextmanager
def open_tensors(path: Path):
    """`safe_open` on the CPU; every way in which the file can be broken becomes a ValueError."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # the library's own error type, OSError, and whatever a crafted header provokes
        raise ValueError(f"{path.name} is not a valid safetensors file: {error}") from None
    with handle:
        yield handle


def read_headers(handle) -> dict[str, TensorHeader]:
    """Shape and dtype of every tensor, without reading one."""
    headers = {}
    keys = handle.keys()
    for key in keys:
        part = handle.get_slice(key)
        headers[key] = TensorHeader(tuple(part.get_shape()), str(part.get_dtype()))
    return headers


def read_tensor(handle, key: str, header: TensorHeader) -> Tensor:
    """The tensor, which may alias the file. ValueError when the file changed since its header was checked."""
    try:
        tensor = handle.get_tensor(key)
    except Exception as error:
        raise ValueError(f"{key} cannot be read: {error}") from None
    if tuple(tensor.shape) != header.shape or tensor.dtype != FLOATS[header.dtype]:
        raise ValueError(f"{key} changed while it was being read")
    return tensor


def path_problem(path: str) -> str | None:
    """Why `path` cannot be a module path, or None."""
    if len(path) > MAX_PATH:
        return f"a module path of {len(path)} characters; expected at most {MAX_PATH}"
    if not path.isprintable() or " " in path or not all(path.split(".")):
        return f"{path!r} is not a module path"
    return None
