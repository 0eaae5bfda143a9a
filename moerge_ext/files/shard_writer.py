"""Safetensors written tensor by tensor, in parts of a bounded size with the index that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

METADATA = {"format": "pt"}
PART_BYTES = 2 << 30


class ShardWriter:
    """Writes tensors into `folder` as NAME.safetensors, or as NAME-00001-of-0000N.safetensors with an index.

    No more than one part of about `part_bytes` is in memory. The files have their names after `finish()`: the folder
    is one that nobody looks at before (`write_folder_atomically`).
    """

    def __init__(self, folder: Path, name: str = "model", part_bytes: int = PART_BYTES):
        self.folder, self.name, self.part_bytes = folder, name, part_bytes
        self._held: dict[str, Tensor] = {}
        self._parts: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """One tensor; ValueError for a key that was written before."""
        if key in self._held or any(key in part for part in self._parts):
            raise ValueError(f"{key} is written twice")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > self.part_bytes:
            self._write()
        self._held[key] = tensor.contiguous()
        self._bytes, self._total = self._bytes + size, self._total + size

    def finish(self) -> int:
        """The last part, the names and the index; returns the bytes of all tensors."""
        self._write()
        if len(self._parts) == 1:
            self._part(0).rename(self.folder / f"{self.name}.safetensors")
            return self._total
        files = {}
        for number, keys in enumerate(self._parts):
            file = f"{self.name}-{number + 1:05d}-of-{len(self._parts):05d}.safetensors"
            self._part(number).rename(self.folder / file)
            files |= dict.fromkeys(keys, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(files.items()))}
        (self.folder / f"{self.name}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        return self._total

    def _part(self, number: int) -> Path:
        return self.folder / f"{self.name}.part{number}"

    def _write(self) -> None:
        save_file(self._held, self._part(len(self._parts)), METADATA)
        self._parts.append(list(self._held))
        self._held, self._bytes = {}, 0
