"""`adapter_model.bin` of PEFT, `pytorch_adapter.bin` of `adapters`: pickles of torch.save, for `moerge convert
--allow-pickle` and nothing else.

A pickle is a program. torch runs it with `weights_only=True`, an interpreter that knows tensors and little else;
mistakes were found in it (CVE-2025-32434, before torch 2.6), so nothing that loads or serves experts opens one. What
comes out is checked like any other adapter before it is written.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.safefile import TensorHeader, file_inside

WEIGHTS_FILE = "adapter_model.bin"
MAX_TIED = 4  # (bytes of all tensors) / (bytes of the file), which holds what tied parameters share once
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class _OpenPickle:
    headers: dict[str, TensorHeader]
    tensors: dict[str, Tensor]

    def read(self, key: str) -> Tensor:
        return self.tensors[key]


@contextmanager
def open_pickle(folder: Path, name: str = WEIGHTS_FILE) -> Iterator[_OpenPickle]:
    """The tensors of the file `name` in a resolved folder. ValueError for anything but a dict of plain tensors."""
    path = file_inside(folder, name)
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the interpreter's refusals, and whatever a crafted file provokes
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path.name} cannot be read as weights alone: {reason}") from None
    tensors = _plain_tensors(path, loaded)
    headers = {
        key: TensorHeader(tuple(t.shape), _NAMES.get(t.dtype, str(t.dtype).removeprefix("torch.")))
        for key, t in tensors.items()
    }
    yield _OpenPickle(headers, tensors)


def _check_archive(path: Path) -> None:
    """torch.save stores its tensors uncompressed: an archive that would grow when it is read is not one of its."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ValueError(f"{path.name} is not a file of torch.save (1.6 or newer): {error}") from None
    grown = sum(entry.file_size for entry in entries)
    if grown > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path.name} is a compressed archive ({grown} bytes inside); torch.save writes none")


def _plain_tensors(path: Path, loaded: Any) -> dict[str, Tensor]:
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"{path.name} must hold a dict of tensors, got {type(loaded).__name__}")
    total = 0
    for key, tensor in loaded.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{path.name} must hold a dict of tensors, got {str(key)[:80]!r}: {type(tensor).__name__}")
        if tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"{path.name}: {key[:200]!r} has no values of its own")
        total += tensor.nbytes
    if total > MAX_TIED * path.stat().st_size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes for tensors of {total}")
    return dict(loaded)
