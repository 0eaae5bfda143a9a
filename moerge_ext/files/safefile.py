"""Opening files that we do not trust: inside their folder, regular, and checked by the safetensors library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from .listing import grouped
from .tensorfile import FLOATS, NARROW, WIDENED, TensorFile, TensorHeader

MAX_PATH = 512  # characters of a module path
MAX_SHOWN = 50  # problems listed for one adapter; the rest are counted


class AdapterError(ValueError):
    """One or more adapters cannot be used. `problems` holds every reason; the message says each cause once."""

    def __init__(self, problems: Sequence[str], heading: str = "the adapter cannot be used"):
        self.problems = list(problems)
        lines = grouped(self.problems)
        shown = lines[:MAX_SHOWN]
        if len(lines) > MAX_SHOWN:
            shown.append(f"... and {len(lines) - MAX_SHOWN} more problems")
        super().__init__(heading + ":" + "".join(f"\n  - {problem}" for problem in shown))

    def __reduce__(self):  # the message is not the first argument, which is what pickle would pass
        return _restore_error, (self.problems, self.args)


def _restore_error(problems: list[str], args: tuple) -> AdapterError:
    error = AdapterError(problems)
    error.args = args
    return error


def file_inside(folder: Path, name: str) -> Path:
    """The resolved path of regular file `name` of `folder`.

    ValueError when it is missing, not a regular file, or a link that leaves the folder. Links of the Hugging
    Face cache (`<repo>/snapshots/<revision>/... -> <repo>/blobs/<hash>`) stay inside their repository and are
    fine.
    """
    try:
        folder = folder.resolve()
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


def in_hub_cache(path: Path) -> bool:
    """Whether a folder or file is one of the Hugging Face cache, which only its library may change."""
    return _hub_blobs(path.resolve()) is not None or _hub_blobs(path.absolute()) is not None


def open_tensors(path: Path) -> TensorFile:
    """The open file, a context manager; every way in which it can be broken becomes a ValueError."""
    try:
        return TensorFile(path)
    except Exception as error:  # the library's own error type, OSError, and whatever a crafted header provokes
        what = what_it_is(path)
        reason = f"it is {what}" if what else str(error)
        raise ValueError(f"{path.name} is not a valid safetensors file: {reason}") from None


def what_it_is(path: Path) -> str | None:
    """What stands in the place of a file of tensors or JSON, when its first bytes tell: "a Git-LFS pointer, ..."."""
    try:
        with open(path, "rb") as opened:
            start = opened.read(512)
    except OSError:
        return None
    if not start:
        return "an empty file; was its download interrupted?"
    if start.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, the text that stands for the file: run `git lfs pull` in its repository"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: download the file itself"
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "a pickle of torch.save under another name"
    if start.startswith(b"GGUF"):
        return "a GGUF file under another name"
    return None


def read_headers(handle: TensorFile) -> dict[str, TensorHeader]:
    """Shape and dtype (as `read_tensor` returns it) of every tensor, without reading one."""
    return dict(handle.headers)


def widened(tensor: Tensor) -> Tensor:
    """8-bit floats in the dtype in which they are computed with; others as they are."""
    return tensor.to(FLOATS[WIDENED]) if tensor.dtype in NARROW.values() else tensor


def read_tensor(handle: TensorFile, key: str, header: TensorHeader) -> Tensor:
    """The tensor, in memory of its own. ValueError when the file changed since its header was checked."""
    if handle.headers.get(key) != header:
        raise ValueError(f"{key} changed while it was being read")
    try:
        return widened(handle.read(key))
    except Exception as error:
        raise ValueError(f"{key} cannot be read: {error}") from None


def path_problem(path: str) -> str | None:
    """Why `path` cannot be a module path, or None."""
    if len(path) > MAX_PATH:
        return f"a module path of {len(path)} characters; expected at most {MAX_PATH}"
    return None if _is_path(path) else f"{path!r} is not a module path"


# experts of one model have the same paths
@lru_cache(maxsize=1 << 14)
def _is_path(path: str) -> bool:
    return path.isprintable() and " " not in path and all(path.split("."))
