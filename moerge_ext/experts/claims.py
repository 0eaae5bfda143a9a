"""What an adapter says of the base model it was trained on, beside its LoRA factors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
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
            with open_weights(self.folder, self.file) as tensors:
                tensor = tensors.read(self.key)
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

    def modules(self) -> list[str]:
        """The modules whose parameters were saved beside the adapter."""
        return list(dict.fromkeys(path.rpartition(".")[0] for path in self.saved))

    def whole(self) -> frozenset[str]:
        """The layers whose own weight was saved beside the adapter, which need no LoRA."""
        return frozenset(path.removesuffix(".weight") for path in self.saved if path.endswith(".weight"))

    def renamed(
        self,
        paths: Mapping[str, str],
        beside: Mapping[str, str] = MappingProxyType({}),
        there: Collection[str] = frozenset(),
    ) -> BaseClaims:
        """The same of modules that go by other paths: {path: new path}, without those that were left out.

        beside: the same of modules without LoRA. A parameter of neither moves with the prefix that all of `paths`
        exchanged, but for a module of a model (`there`, its modules) that knows it by its own path alone: a head.
        """
        old, new = _exchanged(paths)
        known = {**beside, **paths}
        saved = {}
        for path, tensor in self.saved.items():
            module, dot, leaf = path.rpartition(".")
            if module in known:
                path = known[module] + dot + leaf
            elif old != new and (not old or path.startswith(old + ".")):
                moved = ".".join(filter(None, (new, path.removeprefix(old).lstrip("."))))
                path = path if module in there and moved.rpartition(".")[0] not in there else moved
            saved[path] = tensor
        scalings = {paths[path]: scaling for path, scaling in self.scalings.items() if path in paths}
        same = all(path == name for path, name in paths.items())
        return replace(self, saved=saved, scalings=scalings, targets=self.targets if same else None)


def _exchanged(paths: Mapping[str, str]) -> tuple[str, str]:
    """(old, new) prefix by which all paths differ; ("", "") when there is none."""
    for path, name in paths.items():
        if path != name:
            old, new = path.split("."), name.split(".")
            while old and new and old[-1] == new[-1]:
                old, new = old[:-1], new[:-1]
            start, other = "".join(part + "." for part in old), "".join(part + "." for part in new)
            if all(name == other + path.removeprefix(start) for path, name in paths.items() if path.startswith(start)):
                return ".".join(old), ".".join(new)
            break
    return "", ""
