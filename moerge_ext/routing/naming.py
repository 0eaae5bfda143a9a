"""Which layer of a model each module of an expert is: by its own path, a renaming table, or another prefix.

The modules of an expert move together: of all ways to read their paths the one that places most of them on layers of
their size is taken, the paths as they are before any other. Nothing is guessed module by module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from ..experts.keys import bare_path
from .products import layer_features
from .tables import renaming_tables

Sizes = Mapping[str, tuple[int, int]]  # {module path: (D, O)}
Reading = Mapping[str, str | None]  # {path of the expert: bare path in the model}

# Containers by which a text class and the classes around it differ: in, out or exchanged, they change no layer.
CONTAINERS = frozenset(["model", "base_model", "language_model", "text_model", "llm", "thinker", "backbone"])
MAX_PROBES = 8


@dataclass(frozen=True)
class Naming:
    """How the modules of an expert are called in a model."""

    paths: dict[str, str]  # {path of the expert: path in the model, wrappers and all}
    how: str = ""  # the reading; "" for the paths as they are
    missing: list[str] = field(default_factory=list)  # what the model has not
    changed: frozenset[str] = frozenset()  # of these, what this version of the model has fused or split


class ModelPaths:
    """The layers of a model under the paths that adapters know, those of the model without wrappers."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.real: dict[str, str] = {}  # {bare path: path}
        self.sizes: dict[str, tuple[int, int]] = {}  # {bare path: (D, O)} of the linear layers
        for path, layer in model.named_modules(remove_duplicate=False):
            bare = bare_path(path)
            self.real[bare] = path  # of a wrapper and what it wraps, the latter comes last
            features = layer_features(layer)
            if features is not None:
                self.sizes[bare] = features

    @cached_property
    def ends(self) -> dict[str, list[str]]:
        """{end of a path, whole parts: the linear layers with that end}."""
        found: dict[str, list[str]] = {}
        for path in self.sizes:
            parts = path.split(".")
            for i in range(len(parts)):
                found.setdefault(".".join(parts[i:]), []).append(path)
        return found

    def naming(self, wanted: Sizes) -> Naming:
        """The best reading of the paths of one expert."""
        bare = {path: bare_path(path) for path in wanted}
        readings: list[tuple[str, Reading]] = [("", bare)]
        changed: set[str] = set()
        if self._placed(readings[0][1], wanted) < len(wanted):
            for how, table in renaming_tables(self.model).items():
                renamed = table(sorted(bare.values()))
                read = {path: renamed[name] for path, name in bare.items()}
                changed |= {path for path, new in read.items() if new is None}
                readings.append((how, read))
            if max(self._placed(read, wanted) for _, read in readings) < len(wanted):
                readings += [prefixed for how, read in list(readings) for prefixed in self._prefixed(how, read, wanted)]
        how, read = max(readings, key=lambda reading: self._placed(reading[1], wanted))  # the first of equals
        if how and 2 * self._placed(read, wanted) < len(wanted):  # a few equal names are an accident
            how, read = readings[0]
        paths = {path: self.real[new] for path, new in read.items() if new in self.real}
        missing = [path for path in wanted if path not in paths]
        return Naming(paths, how, missing, frozenset(changed.intersection(missing)))

    def near(self, path: str) -> str | None:
        """A layer that has the path but for a prefix."""
        return next((found[0] for _, end in _ends_of(path) if (found := self.ends.get(end))), None)

    def _placed(self, read: Reading, wanted: Sizes) -> int:
        """How many modules find a layer of their size, each another."""
        return len({new for path, new in read.items() if self.sizes.get(new) == wanted[path]})

    def _prefixed(self, how: str, read: Reading, wanted: Sizes) -> Iterator[tuple[str, Reading]]:
        """The reading with one prefix exchanged for another, if one is better than every other."""
        ranked: dict[tuple, list[tuple[str, Reading]]] = {}
        for old, new in self._prefixes(read, wanted):
            neutral = self._is_neutral(old, new)
            if neutral or not old or not new:
                moved = {
                    path: name if self._is_head(name, wanted[path]) else _exchange(name, old, new)
                    for path, name in read.items()
                }
                rank = (self._placed(moved, wanted), neutral, -old.count(".") - bool(old))
                said = f"{how} and " if how else ""
                ranked.setdefault(rank, []).append((f"{said}the prefix '{new}' instead of '{old}'", moved))
        if ranked and len(best := ranked[max(ranked)]) == 1:
            yield best[0]

    def _prefixes(self, read: Reading, wanted: Sizes) -> set[tuple[str, str]]:
        """(old, new) by which some module finds a layer of its size."""
        probes: dict[str, str] = {}  # one path for each kind of layer
        for path, name in read.items():
            if name and len(probes) < MAX_PROBES:
                probes.setdefault(name.rpartition(".")[2], path)
        found = set()
        for path in probes.values():
            for old, end in _ends_of(read[path]):
                for layer in self.ends.get(end, ()):
                    new = layer[: -len(end)].rstrip(".")
                    same_end = old and new and old.rpartition(".")[2] == new.rpartition(".")[2]
                    if self.sizes[layer] == wanted[path] and old != new and not same_end and not _has_number(new):
                        found.add((old, new))
        return found

    def _is_head(self, name: str | None, size: tuple[int, int]) -> bool:
        """Whether it is a layer of its size as it is, and none of many: what stands beside the prefix that moves."""
        return name is not None and self.sizes.get(name) == size and not _has_number(name)

    def _is_neutral(self, old: str, new: str) -> bool:
        parts = Counter(old.split(".") if old else ()), Counter(new.split(".") if new else ())
        differing = set((parts[0] - parts[1]) + (parts[1] - parts[0]))
        return differing <= CONTAINERS | {getattr(self.model, "base_model_prefix", "")}


def _ends_of(path: str) -> Iterator[tuple[str, str]]:
    """(start, end) of a path cut between its parts, the longest end first; the number of a layer is never cut off."""
    parts = path.split(".")
    for i in range(len(parts)):
        yield ".".join(parts[:i]), ".".join(parts[i:])
        if parts[i].isdigit():
            return


def _has_number(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def _exchange(path: str | None, old: str, new: str) -> str | None:
    """`path` with the prefix `new` for `old`; as it is when it does not begin with `old`."""
    if path is None or (old and not path.startswith(old + ".")):
        return path
    rest = path[len(old) :].lstrip(".")
    return f"{new}.{rest}" if new else rest
