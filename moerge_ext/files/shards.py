"""Safetensors in one file or in several: `adapter_model.safetensors`, or `adapter_model-00001-of-00003.safetensors` ...

transformers splits large files so and writes an index beside them (`model.safetensors.index.json`, for an adapter too),
whose `weight_map` names the file of every tensor. The files' own headers decide; an index must agree with them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .counting import counted
from .safefile import TensorHeader, file_inside, open_tensors, read_headers, read_tensor
from .tensorfile import TensorFile

MAX_SHARDS = 1000
MAX_INDEX_BYTES = 64 << 20
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclass(frozen=True)
class OpenShards:
    """The tensors of open files as one set."""

    headers: dict[str, TensorHeader]
    holders: dict[str, TensorFile]  # key: the open file

    def read(self, key: str) -> Tensor:
        """The tensor, in memory of its own."""
        return read_tensor(self.holders[key], key, self.headers[key])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Some rows of a tensor, read alone."""
        return self.holders[key].rows(key, start, stop)


def has_weights(folder: Path, name: str) -> bool:
    """Whether `folder` has the file `name`, or the parts of it."""
    return os.path.lexists(folder / name) or bool(_parts_of(folder, name))


def _parts_of(folder: Path, name: str) -> list[re.Match[str]]:
    stem = name.removesuffix(".safetensors")
    matches = (_SHARD.fullmatch(path.name) for path in folder.glob(f"{stem}-*.safetensors"))
    return sorted((match for match in matches if match and match["stem"] == stem), key=lambda match: match[0])


@contextmanager
def open_weights(folder: Path, name: str) -> Iterator[OpenShards]:
    """Opens `name` of a resolved folder, or all its parts. ValueError for whatever is missing or broken."""
    if os.path.lexists(folder / name) or not (parts := _parts_of(folder, name)):
        with open_tensors(file_inside(folder, name)) as handle:
            headers = read_headers(handle)
            yield OpenShards(headers, dict.fromkeys(headers, handle))
        return
    totals = {int(part["total"]) for part in parts}
    missing = sorted(set(range(1, max(totals) + 1)) - {int(part["number"]) for part in parts})[:5]
    if len(totals) > 1 or max(totals) > MAX_SHARDS or missing or len(parts) != max(totals):
        raise ValueError(
            f"the parts of {name} are not complete: found {', '.join(part[0] for part in parts[:5])}"
            + (f", without number {', '.join(map(str, missing))}" if missing else "")
        )
    with ExitStack() as stack:
        headers: dict[str, TensorHeader] = {}
        holders: dict[str, TensorFile] = {}
        for part in parts:
            handle = stack.enter_context(open_tensors(file_inside(folder, part[0])))
            for key, header in read_headers(handle).items():
                if key in headers:
                    raise ValueError(f"{key} stands in two parts of {name}")
                headers[key], holders[key] = header, handle
        _check_index(folder, name, headers)
        yield OpenShards(headers, holders)


def _check_index(folder: Path, name: str, headers: dict[str, TensorHeader]) -> None:
    """ValueError when an index names tensors that the parts do not hold: a part was mixed up or is of another save."""
    for index in (f"{name}.index.json", "model.safetensors.index.json"):
        if not (folder / index).exists():
            continue
        path = file_inside(folder, index)
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"{index} has {path.stat().st_size} bytes; expected at most {MAX_INDEX_BYTES}")
        try:
            listed = json.loads(path.read_bytes().decode("utf-8"))["weight_map"].keys()
            lacking = sorted(listed - headers.keys())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not an index of tensors ({type(error).__name__})") from None
        if lacking:
            such = lacking[0][:200]
            raise ValueError(
                f"{index} lists {counted(len(lacking), 'tensor')} that the parts do not hold, such as {such}"
            )
        return
