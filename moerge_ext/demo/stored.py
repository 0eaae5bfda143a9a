"""How the trained files of both demos are stored: small, and without what PEFT leaves beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def store_as(file: Path, dtype: torch.dtype, note: Mapping[str, str] | None = None) -> None:
    """Rewrite every tensor of a safetensors file as `dtype`; its header's entries stay, and those of `note` come."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    save_file(tensors, file, metadata={"format": "pt", **metadata, **(note or {})})


def tidy(folder: Path) -> None:
    """Remove PEFT's empty model card; everybody may read the rest."""
    for file in (*folder.iterdir(),):
        if file.name == "README.md":
            file.unlink()
        else:
            file.chmod(0o644)


def size_of(folder: Path) -> int:
    """Bytes of all files together."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
