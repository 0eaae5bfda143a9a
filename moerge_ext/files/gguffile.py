"""Reading GGUF files that we do not trust: the header within its bounds, tensors straight from the file.

    "GGUF", version (u32), number of tensors (u64), number of values (u64)
    values:  key (string), type (u32), value      strings: length (u64), bytes; arrays: type (u32), length (u64), items
    tensors: name (string), number of sizes (u32), sizes (u64, the fastest first), type (u32), offset (u64)
    data, aligned

Every length is held against the bytes that are left before anything is read or counted. The `gguf` package is not used:
its reader (0.19.0) walks an array as long as the header claims, so that a file of 49 bytes fills the memory.
(Layout: ggml, docs/gguf.md.)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_HEADER = 16 << 20  # bytes; an adapter's header has some hundred of them per tensor
MAX_DIMS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# ggml's number of a type: (its name, how the values are held, elements of a block, bytes of a block)
_FLOATS = {0: ("F32", "F32", 1, 4), 1: ("F16", "F16", 1, 2), 30: ("BF16", "BF16", 1, 2), 28: ("F64", "F64", 1, 8)}
_TYPES = _FLOATS | {8: ("Q8_0", "F32", 32, 34)}
_HELD = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `held_as` names the dtype (safetensors' name) in which its values are exact."""

    name: str
    shape: tuple[int, ...]  # the slowest size first, as torch has it
    type: str
    held_as: str
    start: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file. Arrays among the values are only counted: {key: (length,)}."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """The checked header. ValueError with the reason for a file that is broken, cut short, or of an unknown kind."""
    size = path.stat().st_size
    with open(path, "rb") as opened:
        cursor = _Cursor(opened.read(MAX_HEADER))
    try:
        return _parse(path, cursor, size)
    except ValueError as error:
        what = str(error)
        if cursor.at + 8 > MAX_HEADER:
            what = f"its header is larger than {MAX_HEADER >> 20} MiB"
        raise ValueError(f"{path.name} is not a valid GGUF file: {what}") from None


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        raise ValueError("it is big-endian" if swapped else f"its version is {version}; expected 2 or 3")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(cursor.counted(pairs, 12)):
        key = cursor.text()
        if key in values:
            raise ValueError(f"the key {key[:80]!r} stands twice")
        values[key] = _value(cursor, cursor.number("I"))
    rows = [_tensor_row(cursor) for _ in range(cursor.counted(tensors, 24))]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment % 8 or not 8 <= alignment <= 1 << 16:
        raise ValueError(f"general.alignment must be a multiple of 8, got {alignment!r}")
    data = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in rows:
        if name in found:
            raise ValueError(f"the tensor {name[:80]!r} stands twice")
        found[name] = _placed(name, shape, kind, data + offset, size)
    if sum(tensor.nbytes for tensor in found.values()) > size:
        raise ValueError("its tensors share bytes")
    return GgufFile(path, values, found)


class _Cursor:
    """The header's bytes, read one after the other; a step past their end is a ValueError."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends within its header (at byte {len(self.data)})")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"a name or text at byte {self.at - len(raw)} is not UTF-8") from None

    def counted(self, count: int, least: int) -> int:
        """`count`, when that many items of at least `least` bytes can still follow."""
        if count * least > len(self.data) - self.at:
            raise ValueError(f"it claims {count} items where {len(self.data) - self.at} bytes of its header are left")
        return count


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise ValueError(f"a value of unknown type {kind}")
    item, length = cursor.number("I"), cursor.number("Q")
    if item in _SCALARS:
        cursor.take(length * struct.calcsize("<" + _SCALARS[item]))
    elif item == _STRING:
        for _ in range(cursor.counted(length, 8)):
            cursor.take(cursor.number("Q"))
    else:
        raise ValueError(f"an array of values of type {item}")
    return (length,)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type, offset) as the header has them."""
    name, dims = cursor.text(), cursor.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise ValueError(f"{name[:80]!r} has {dims} sizes; expected 1 to {MAX_DIMS}")
    sizes = [cursor.number("Q") for _ in range(dims)]
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _placed(name: str, shape: tuple[int, ...], kind: int, start: int, size: int) -> GgufTensor:
    if kind not in _TYPES:
        known = ", ".join(row[0] for row in _TYPES.values())
        raise ValueError(f"{name[:80]!r} is of ggml's type {kind}; expected one of {known}: convert with --outtype f16")
    label, held_as, block, block_bytes = _TYPES[kind]
    if shape[-1] % block:
        raise ValueError(f"{name[:80]!r} is {label} with rows of {shape[-1]}; expected a multiple of {block}")
    nbytes = math.prod(shape) // block * block_bytes
    if start + nbytes > size:
        raise ValueError(f"{name[:80]!r} ends at byte {start + nbytes} of {size}: the file was cut short")
    return GgufTensor(name, shape, label, held_as, start, nbytes)


def map_gguf(file: GgufFile) -> mmap.mmap:
    """The file's bytes, for `read_values`. ValueError when its header is another one than `file`."""
    with open(file.path, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that could be written
    if read_gguf(file.path) != file or any(t.start + t.nbytes > len(mapped) for t in file.tensors.values()):
        raise ValueError(f"{file.path.name} changed while it was being read")
    return mapped


def read_values(mapped: mmap.mmap, tensor: GgufTensor) -> Tensor:
    """The tensor; it aliases the mapped file unless it is converted."""
    if tensor.nbytes == 0:
        return torch.empty(tensor.shape, dtype=_HELD[tensor.held_as], device="cpu")
    if tensor.type == "Q8_0":
        return _from_q8_0(torch.frombuffer(mapped, dtype=torch.uint8, count=tensor.nbytes, offset=tensor.start), tensor)
    dtype = _HELD[tensor.held_as]
    count = tensor.nbytes // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=tensor.start).reshape(tensor.shape)


def _from_q8_0(raw: Tensor, tensor: GgufTensor) -> Tensor:
    """Blocks of 32: a float16 scale and 32 signed bytes; value = scale * byte."""
    blocks = raw.reshape(-1, 34)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    return (scales * blocks[:, 2:].contiguous().view(torch.int8).float()).reshape(tensor.shape)
