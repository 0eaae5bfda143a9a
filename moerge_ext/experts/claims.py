"""What an adapter says of the base model it was trained on, beside its LoRA factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..files.shards import open_weights

if TYPE_CHECKING:
    from .formats.peft_targets import Targets


@dataclass(frozen=True)
class SavedTensor:
    """A parameter or buffer of the base that was saved beside an adapter: a head, an embedding, a bias.

    Often far larger than the adapter, so it stays in its file until somebody asks.
    """

    shape: tuple[int, ...]
    key: str
    folder: Path | None = None
    file: str = ""
    tensor: Tensor | None = field(default=None, repr=False)  # instead of a file

    def read(self) -> Tensor:
        """The tensor, which may alias the file. ValueError when it is not what was checked before."""
        if self.tensor is not None:
            return self.tensor
        try:
            with open_weights(self.folder, self.file) as opened:
                tensor = opened.read(self.key)
        except Exception as error:  # whatever a file that changed since provokes
            raise ValueError(f"{self.key} of {self.folder} cannot be read: {error}") from None
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.key} of {self.folder} changed since the adapter was loaded")
        return tensor


@dataclass(frozen=True)
class BaseClaims:
    """saved: {parameter path: what the adapter holds of it}; init: "pissa" or "olora" when training began by moving a
    part of each weight into the factors, and scalings: {module path: the factors' scaling} of those; targets: the
    modules that should have weights, or None.
    """

    saved: Mapping[str, SavedTensor] = field(default_factory=dict)
    init: str | None = None
    scalings: Mapping[str, float] = field(default_factory=dict)
    targets: Targets | None = None
