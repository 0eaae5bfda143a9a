"""The tensors of a safetensors file, each read from its place into memory of its own.

    length of the header (u64), header (JSON), data
    header: {name: {"dtype": ..., "shape": [...], "data_offsets": [start, stop]}, ..., "__metadata__": {text: text}}

The library says whether a file is one (`safefile.py`). It is not mapped here, as the library does: a mapped file that
is cut short kills the process that reads on, and a tensor of the mapping takes ten times as long to make.
"""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# safetensors' names of the dtypes an adapter may have
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
# 8-bit floats, which no kernel computes in: read as the smallest dtype of FLOATS that holds all their values
NARROW = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
WIDENED = "BF16"
_SIGNED = {f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)}
_UNSIGNED = {f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)}
_TYPES = FLOATS | NARROW | _SIGNED | _UNSIGNED | {"BOOL": torch.bool, "C64": torch.complex64}
# how numpy holds the bits of what it has no type for
_HELD = {"BF16": np.dtype("<i2")} | dict.fromkeys(NARROW, np.dtype("u1"))
_HELD |= {name: torch.empty(0, dtype=dtype).numpy().dtype for name, dtype in _TYPES.items() if name not in _HELD}


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


class TensorFile:
    """An open file; headers: {name: shape, and dtype as `safefile.read_tensor` gives it}.

    Raises ValueError, OSError, or whatever JSON that is no header provokes.
    """

    def __init__(self, path: Path):
        self._file = io.FileIO(path)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            length = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(self._bytes(8, length).tobytes())
            self._metadata: dict[str, str] | None = header.pop("__metadata__", None)
            self._places = {key: self._place(said, 8 + length) for key, said in header.items()}
        except BaseException:
            self._file.close()
            raise
        self.headers = {
            key: TensorHeader(place.shape, WIDENED if place.dtype in NARROW else place.dtype)
            for key, place in self._places.items()
        }

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def metadata(self) -> dict[str, str] | None:
        """The texts of its header."""
        return self._metadata

    def read(self, key: str) -> Tensor:
        """A whole tensor. ValueError when the file does not hold it (any more), or its type cannot be held."""
        place = self._places[key]
        return self._tensor(place, place.shape, place.start)

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows start to stop of a tensor."""
        place = self._places[key]
        start, stop, _ = slice(start, stop).indices(place.shape[0])
        width = math.prod(place.shape[1:]) * _TYPES[place.dtype].itemsize
        return self._tensor(place, (stop - start, *place.shape[1:]), place.start + start * width)

    def _place(self, said: dict[str, Any], data: int) -> _Place:
        dtype, shape, (start, stop) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
        if not 0 <= start <= stop <= self._size - data:
            raise ValueError("a tensor lies outside the file")
        if dtype in _TYPES and math.prod(shape) * _TYPES[dtype].itemsize != stop - start:
            raise ValueError("a tensor has not the size that its shape asks for")
        return _Place(shape, dtype, data + start)

    def _tensor(self, place: _Place, shape: tuple[int, ...], start: int) -> Tensor:
        if place.dtype not in _TYPES:
            raise ValueError(f"there is no tensor of type {place.dtype}")
        values = np.empty(shape, _HELD[place.dtype])
        self._fill(values, start)
        tensor = torch.from_numpy(values)
        return tensor.view(_TYPES[place.dtype]) if place.dtype in ("BF16", *NARROW) else tensor

    def _bytes(self, start: int, count: int) -> np.ndarray:
        if count > self._size - start:
            raise ValueError("the file ends within its header")
        values = np.empty(count, np.uint8)
        self._fill(values, start)
        return values

    def _fill(self, values: np.ndarray, start: int) -> None:
        self._file.seek(start)
        got = self._file.readinto(values)
        while got < values.nbytes:  # a read stops at 2 GiB
            more = self._file.readinto(values.reshape(-1).view(np.uint8)[got:])
            if not more:
                raise ValueError("the file ends within it")
            got += more
