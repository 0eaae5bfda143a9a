"""Which modules a PEFT config gives weights: `target_modules`, `exclude_modules`, `layers_to_transform`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from .peft_patterns import LayerNumbers, ModuleNames


@dataclass(frozen=True)
class Targets:
    """What a config says of the modules with weights; None where it says nothing, or nothing that can be read."""

    named: ModuleNames | None
    excluded: ModuleNames | None
    layers: LayerNumbers | None

    def left_out(self, paths: Collection[str]) -> dict[str, str]:
        """{module path: why the config gives it no weights}, for the paths that have weights all the same."""
        reasons: dict[str, str] = {}
        if self.layers is not None:
            reasons |= {path: "layers_to_transform leaves its layer out" for path in paths if self._layer_is_out(path)}
        if self.excluded is not None and self.excluded.knows(paths):
            reasons |= {path: "exclude_modules names it" for path in paths if self.excluded.match(path)}
        if self.named is not None and self.named.knows(paths):
            reasons |= {path: "target_modules does not name it" for path in paths if not self.named.match(path)}
        return reasons

    def wanted(self, paths: Collection[str]) -> list[str]:
        """Those of the paths that the config gives weights for certain."""
        if self.named is None or not self.named.knows(paths):
            return []
        if self.excluded is not None and not self.excluded.knows(paths):
            return []
        return [
            path
            for path in paths
            if self.named.match(path)
            and not (self.excluded is not None and self.excluded.match(path))
            and not (self.layers is not None and self._layer_is_out(path))
        ]

    def known(self, paths: Collection[str]) -> Targets:
        """Without the listed names that fit none of the paths: those that other versions of a model have."""
        unused = self.named.unused(paths) if self.named is not None else []
        return replace(self, named=ModuleNames(self.named.names - set(unused))) if unused else self

    def unused(self, paths: Collection[str]) -> list[str]:
        """The listed targets that fit none of the paths, but for those that are excluded."""
        names = self.named.unused(paths) if self.named is not None else []
        if self.excluded is not None and self.excluded.knows(names):
            names = [name for name in names if not self.excluded.match(name)]
        return names

    def _layer_is_out(self, path: str) -> bool:
        # PEFT asks for the layer of modules that are named by their ends, not of whole paths
        whole = self.named.names if self.named is not None and self.named.names else ()
        return path not in whole and not self.layers.match(path)
