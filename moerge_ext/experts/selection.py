"""What `load_experts` takes of the adapters it is given, and under which names: `names`, `modules`, `rename`."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..files.safefile import path_problem
from .claims import BaseClaims
from .formats.peft import GateSet, LoraWeights, ModuleHeader

Modules = str | re.Pattern[str] | Callable[[str], bool] | None
Rename = Mapping[str, str] | Callable[[str], str] | None


@dataclass(frozen=True)
class RenamedSource:
    """A source whose modules go by other paths; `paths` is {path in the adapter: path here}."""

    source: Any
    paths: dict[str, str]
    beside: dict[str, str] = field(default_factory=dict)  # the same of modules that only the base has
    modules: dict[str, ModuleHeader] = field(default_factory=dict)
    gates: dict[str, GateSet] = field(default_factory=dict)

    @property
    def stored_paths(self) -> dict[str, str]:
        """{path here: path in the adapter}."""
        return {new: old for old, new in self.paths.items()}

    def read(self) -> Iterator[tuple[str, LoraWeights]]:
        for path, weights in self.source.read():
            yield self.paths[path], weights

    def __getattr__(self, name: str) -> Any:
        """Name, folder, config, notes: the source's own."""
        return getattr(self.source, name)

    @property
    def claims(self) -> BaseClaims:
        return self.source.claims.renamed(self.paths, self.beside)


class Selection:
    """The arguments `modules`, `rename` and `names` of `load_experts`, checked."""

    def __init__(self, modules: Modules = None, rename: Rename = None, names: Iterable[str] | None = None):
        problems = []
        self.keeps = _keeper(modules, problems)
        self._rename = rename
        if rename is not None and not callable(rename) and not _is_text_map(rename):
            problems.append(f"rename must be {{old: new}} or a function of the path, got {rename!r}")
        self.names = None if names is None or isinstance(names, str) else tuple(names)
        if isinstance(names, str) or not all(isinstance(name, str) for name in self.names or ()):
            problems.append(f"names must be a list of expert names, got {names!r}")
        elif twice := [name for name, count in Counter(self.names or ()).items() if count > 1]:
            problems.append(f"names has {', '.join(twice)} more than once: name every expert once")
        if problems:
            raise ValueError("load_experts: " + "; ".join(problems))

    def choose(self, there: Sequence[str]) -> list[str]:
        """The names to load, in the order of `names`; ValueError for one that is not there."""
        if self.names is None:
            return list(there)
        if not self.names:
            raise ValueError(f"load_experts: names is empty; there are {', '.join(there)}")
        if unknown := [name for name in self.names if name not in there]:
            raise ValueError(f"load_experts: no expert named {', '.join(unknown)}; there are {', '.join(there)}")
        return list(self.names)

    def rename(self, sources: Sequence[Any], complete: bool = True) -> tuple[list[Any], dict[str, list[str]]]:
        """(the sources under their new paths, {expert: problems}). ValueError when `rename` meets no path at all;
        not when the sources are not `complete`, as the paths of the others are not known.
        """
        if self._rename is None:
            return list(sources), {}
        change = self._rename if callable(self._rename) else _Replacing(self._rename)
        renamed, bad = [], {}
        for source in sources:
            paths = {path: change(path) for path in source.modules}
            beside = {path: change(path) for path in source.claims.modules() if path not in paths}
            if problems := _path_problems(paths | beside):
                bad[repr(source.name)] = problems
            else:
                renamed.append(_under(source, paths, beside, change))
        if complete and not callable(self._rename) and (unused := change.unused()):
            some = next(iter(sources[0].modules), "none") if sources else "none"
            raise ValueError(
                f"load_experts: rename has {', '.join(map(repr, unused))}, which no module path contains (whole parts "
                f"between dots are matched; a path of the experts: {some})"
            )
        return renamed, bad


def alone(names: Iterable[str]) -> str:
    """The argument by which these experts alone are loaded, in this order."""
    return f"names={list(names)} (--names {shlex.join(names)})"


def _keeper(modules: Modules, problems: list[str]) -> Callable[[str], bool] | None:
    if modules is None or callable(modules):
        return modules
    try:
        pattern = re.compile(modules)
    except (re.error, TypeError) as error:
        problems.append(f"modules must be a regular expression or a function of the path, got {modules!r} ({error})")
        return None
    return lambda path: pattern.search(path) is not None


def _is_text_map(rename: Any) -> bool:
    return (
        isinstance(rename, Mapping)
        and bool(rename)
        and all(isinstance(old, str) and isinstance(new, str) for old, new in rename.items())
    )


class _Replacing:
    """{old: new}, whole parts of a path between dots, longest first; "" is the start of every path."""

    def __init__(self, rename: Mapping[str, str]):
        self.new = {old.strip("."): new.strip(".") for old, new in rename.items()}
        self.used: set[str] = set()
        olds = sorted(filter(None, self.new), key=len, reverse=True)
        self.pattern = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, olds))})(?![^.])") if olds else None

    def __call__(self, path: str) -> str:
        if self.pattern is not None:
            path = self.pattern.sub(self._replace, path)
        if "" in self.new:
            self.used.add("")
            path = f"{self.new['']}.{path}"
        return ".".join(filter(None, path.split(".")))

    def _replace(self, match: re.Match[str]) -> str:
        self.used.add(match[0])
        return self.new[match[0]]

    def unused(self) -> list[str]:
        return [old for old in self.new if old not in self.used]


def _path_problems(paths: Mapping[str, Any]) -> list[str]:
    problems, seen = [], {}
    for old, new in paths.items():
        why = path_problem(new) if isinstance(new, str) else f"expected a module path, got {new!r}"
        if why:
            problems.append(f"{old}: renamed to {new!r}: {why}")
        elif seen.setdefault(new, old) != old:
            problems.append(f"{old}: rename makes it {new}, which {seen[new]} is already")
    return problems


def _under(source: Any, paths: dict[str, str], beside: dict[str, str], change: Callable[[str], str]) -> RenamedSource:
    gates = {
        kind: replace(gates, gates={paths.get(path) or change(path): gate for path, gate in gates.gates.items()})
        for kind, gates in source.gates.items()
    }
    modules = {paths[path]: header for path, header in source.modules.items()}
    return RenamedSource(source, paths, beside, modules, gates)
