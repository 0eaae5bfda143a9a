"""The tensors of a safetensors file, each read from its place into memory of its own.

    length of the header (u64), header (JSON), data
    header: {name: {"dtype": ..., "shape": [...], "data_offsets": [start, stop]}, ..., "__metadata__": {text: text}}

The library says whether a file is one. It is not mapped here, as the library does: a mapped file that is cut short
kills the process that reads on, and the library's tensors of a mapping take as long to make (420 factors: 12 ms, with
nothing of them read) as these with their data (9 ms).
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

# safetensors' names of the dtypes an adapter may have
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# 8-bit floats, which no kernel computes in: read as the smallest dtype of FLOATS that holds all their values
NARROW = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
WIDENED = "BF16"
MAX_KEPT = 1 << 20  # bytes of a header
_SIGNED = {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
_UNSIGNED = {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}
_TYPES = FLOATS | NARROW | _SIGNED | _UNSIGNED | {"BOOL": torch.bool, "C64": torch.complex64}
# how numpy holds the bits of what it has no type for
_AS_BITS = {"BF16": np.dtype("<i2")} | dict.fromkeys(NARROW, np.dtype("u1"))
_HELD = {
    name: _AS_BITS.get(name) or torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    for name, dtype in _TYPES.items()
}


class TensorHeader(NamedTuple):
    """What a safetensors header says about one tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 1)


class _Place(NamedTuple):
    """Where a tensor lies."""

    shape: tuple[int, ...]
    dtype: str  # as stored
    start: int  # bytes from the start of the file


class _Layout(NamedTuple):
    """What a header says, shared by the files that have it."""

    metadata: dict[str, str] | None
    headers: dict[str, TensorHeader]
    places: dict[str, _Place]


@dataclass(frozen=True)
class _Start:
    """The header of a file of `size` bytes as it is stored: what the library checks depends on nothing else."""

    header: bytes
    size: int
    path: Path = field(compare=False)

    def layout(self) -> _Layout:
        with safe_open(self.path, framework="pt", device="cpu"):
            pass
        # the library may have seen another file than the one that is open here, so nothing is taken for granted
        said = json.loads(self.header)
        metadata, data = said.pop("__metadata__", None), 8 + len(self.header)
        places = {key: _place(what, data, self.size) for key, what in said.items()}
        headers = {
            key: TensorHeader(place.shape, WIDENED if place.dtype in NARROW else place.dtype)
            for key, place in places.items()
        }
        return _Layout(metadata, headers, places)


@lru_cache(maxsize=8)
def _known_layout(start: _Start) -> _Layout:
    """The experts of a pool mostly have one header, and each file is opened twice."""
    return start.layout()


def _place(said: dict[str, Any], data: int, size: int) -> _Place:
    dtype, shape, (start, stop) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    if not 0 <= start <= stop <= size - data:
        raise ValueError("a tensor lies outside the file")
    if dtype in _TYPES and math.prod(shape) * _TYPES[dtype].itemsize != stop - start:
        raise ValueError("a tensor has not the size that its shape asks for")
    return _Place(shape, dtype, data + start)


class TensorFile:
    """An open file; headers: {name: shape, and dtype as `safefile.read_tensor` gives it}.

    Raises ValueError, OSError, the library's own error, or whatever JSON that is no header provokes.
    """

    def __init__(self, path: Path):
        self._file = io.FileIO(path)
        try:
            start = self._start(path)
            layout = _known_layout(start) if len(start.header) <= MAX_KEPT else start.layout()
        except BaseException:
            self._file.close()
            raise
        self._metadata, self.headers, self._places = layout

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def metadata(self) -> dict[str, str] | None:
        """The texts of its header, the caller's own."""
        return None if self._metadata is None else dict(self._metadata)

    def read(self, key: str) -> Tensor:
        """A whole tensor. ValueError when the file does not hold it any more, or torch has no such type."""
        place = self._places[key]
        return self._tensor(place, place.shape, place.start)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor."""
        place = self._places[key]
        start, stop, _ = slice(start, stop).indices(place.shape[0])
        width = math.prod(place.shape[1:]) * _TYPES[place.dtype].itemsize
        return self._tensor(place, (stop - start, *place.shape[1:]), place.start + start * width)

    def _start(self, path: Path) -> _Start:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        # a header that cannot be there is left to the library, which says why
        return _Start(self._file.read(length) if length <= size - 8 else b"", size, path)

    def _tensor(self, place: _Place, shape: tuple[int, ...], start: int) -> Tensor:
        if place.dtype not in _TYPES:
            raise ValueError(f"there is no tensor of type {place.dtype}")
        values = np.empty(shape, _HELD[place.dtype])
        self._fill(values, start)
        tensor = torch.from_numpy(values)
        return tensor.view(_TYPES[place.dtype]) if place.dtype in _AS_BITS else tensor

    def _fill(self, values: np.ndarray, start: int) -> None:
        self._file.seek(start)
        got = self._file.readinto(values)
        while got < values.nbytes:  # a read stops at 2 GiB
            more = self._file.readinto(values.reshape(-1).view(np.uint8)[got:])
            if not more:
                raise ValueError("the file ends within it")
            got += more
