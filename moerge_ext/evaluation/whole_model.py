"""Another model as a row of `moerge eval`, beside methods that route among experts on the base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..models.pretrained import load_model, load_tokenizer
from ..models.stored import model_folder
from .answers import Answerer

_PIECE = 1 << 24  # bytes read at a time


class WholeModel(Answerer):
    """Who answers for `evaluate(answerers=...)`: the model of a folder, in memory while it answers only.

    path: folder or hub id with safetensors; dtype, device: as in `load_model`. ValueError when there is no such model.
    """

    def __init__(self, path: str, *, dtype: str = "auto", device: str | torch.device = "cpu"):
        self.folder, self.dtype, self.device = model_folder(path), dtype, device

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the answers depend on: the content of the folder's files, and the type that is computed in."""
        return {"model": {"files": content(self.folder), "dtype": self.dtype}}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A block in which it answers."""
        tokenizer = load_tokenizer(str(self.folder))
        super().__init__(load_model(str(self.folder), dtype=self.dtype, device=self.device), tokenizer)
        try:
            yield
        finally:
            del self.model, self.tokenizer


def content(folder: Path) -> str:
    """One digest of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or not file.is_file():
            continue
        digest.update(f"{file.name}\n".encode())
        with open(file, "rb") as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]
