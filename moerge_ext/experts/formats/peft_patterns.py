"""Module names and patterns of adapter configs (`rank_pattern`, `alpha_pattern`, `target_modules`,
`exclude_modules`), matched in bounded time.

PEFT matches a pattern `key` against a module path as the regular expression `(.*\\.)?(key)$`, and such keys
come from a file we do not trust: a backtracking engine can be made to run for years. This module accepts the
part of the syntax that names modules (literals, `.`, `\\.`, `\\d`, `\\w`, `[...]`, groups, `|`, `?`, `*`,
`+`, `^`, `$`) and follows all possible matches at once: the set of reachable positions in the path is one
integer, a bit per position, so a match costs (pattern length) x (path length) at most and cannot blow up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

MAX_PATTERN = 1024  # characters
MAX_DEPTH = 8  # nested groups
MAX_WORK = 100_000_000  # (characters of patterns with operators) x (characters of paths), some seconds

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.\-]+\$?")
# A node maps (path, set of start positions) to the set of positions where a match of it can end.
_Node = Callable[["_Path", int], int]


class _Path:
    """A module path with, for every kind of character asked for, the set of positions that hold it."""

    def __init__(self, text: str):
        self.text = text
        self.end = 1 << len(text)
        self._occurrences: dict[str, int] = {}

    def occurrences(self, atom: str, test: re.Pattern[str]) -> int:
        if atom not in self._occurrences:
            bits = (1 << i for i, char in enumerate(self.text) if test.fullmatch(char))
            self._occurrences[atom] = sum(bits)
        return self._occurrences[atom]


class ModulePattern:
    """One pattern over module paths. Raises ValueError for a key outside the accepted syntax."""

    def __init__(self, key: str):
        if not key or len(key) > MAX_PATTERN:
            raise ValueError(f"a pattern must have 1 to {MAX_PATTERN} characters, got {len(key)}")
        self.key = key
        self._plain = key.strip("^$") if _PLAIN.fullmatch(key) else None
        self._anchored = key.startswith("^")
        self._node = None if self._plain is not None else _Parser(key).parse()

    @property
    def is_complex(self) -> bool:
        """Whether the key is more than a literal with wildcards."""
        return self._plain is None

    def matches(self, path: str) -> bool:
        """Whether PEFT's rule `(.*\\.)?(key)$` matches `path` from its start."""
        if self._plain is not None:
            return self._matches_plain(path)
        starts = 1 | sum(1 << (i + 1) for i, char in enumerate(path) if char == ".")
        target = _Path(path)
        return bool(self._node(target, starts) & target.end)

    def fits_all_of(self, path: str) -> bool:
        """Whether the pattern matches the whole path, PEFT's rule for `target_modules` as a string."""
        if self._plain is not None:
            return len(path) == len(self._plain) and self._matches_plain(path)
        target = _Path(path)
        return bool(self._node(target, 1) & target.end)

    def _matches_plain(self, path: str) -> bool:
        key, before = self._plain, len(path) - len(self._plain)
        if before < 0 or (before > 0 and (self._anchored or path[before - 1] != ".")):
            return False
        tail = path[before:]
        # a bare "." is a wildcard, as in PEFT
        return tail == key or all(k in (c, ".") for k, c in zip(key, tail, strict=True))


class ModuleNames:
    """`target_modules` or `exclude_modules`: a list of names (whole paths or ends of them), or one regular
    expression for whole paths.

    A regular expression outside the accepted syntax, "all-linear", or one that is too much work for the
    paths says nothing about them: `knows` is False.
    """

    def __init__(self, value: str | Collection[str]):
        self.names = None if isinstance(value, str) else frozenset(value)
        self._pattern: ModulePattern | None = None
        if isinstance(value, str) and value.lower() != "all-linear":
            try:
                self._pattern = ModulePattern(value)
            except ValueError:  # valid for PEFT all the same
                self._pattern = None

    def knows(self, paths: Collection[str]) -> bool:
        """Whether `match` can tell for these paths."""
        if self._pattern is None:
            return self.names is not None
        return len(self._pattern.key) * sum(len(path) for path in paths) <= MAX_WORK

    def match(self, path: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fits_all_of(path)
        return not self.names.isdisjoint(_ends(path))

    def unused(self, paths: Collection[str]) -> list[str]:
        """The listed names that fit none of the paths."""
        if self.names is None:
            return []
        return sorted(self.names - {end for path in paths for end in _ends(path)})


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


class LayerNumbers:
    """`layers_to_transform` with `layers_pattern`: which layers have weights.

    PEFT takes the number after `layers_pattern`, or without one a number that its versions choose
    differently (the first or the last in the path), so a path is left out only when no such number is listed.
    """

    def __init__(self, numbers: Collection[int], names: Collection[str] = ()):
        self.numbers = frozenset(str(number) for number in numbers)
        # a layers_pattern with operators narrows nothing down
        plain = bool(names) and all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
        self._names = [name.split(".") for name in names] if plain else [[]]

    def match(self, path: str) -> bool:
        parts = path.split(".")
        return any(
            parts[i] in self.numbers and any(parts[max(0, i - len(name)) : i] == name for name in self._names)
            for i in range(1, len(parts) - 1)
        )


class _Parser:
    """Recursive descent over the accepted syntax; every method returns a node and whether it holds a loop."""

    def __init__(self, key: str):
        self.key = key
        self.at = 0

    def parse(self) -> _Node:
        node, _ = self.alternatives(0)
        if self.at < len(self.key):
            raise self.error("unbalanced ')'")
        return node

    def error(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self.at}; only simple patterns over module names are read")

    def peek(self) -> str:
        return self.key[self.at] if self.at < len(self.key) else ""

    def alternatives(self, depth: int) -> tuple[_Node, bool]:
        if depth > MAX_DEPTH:
            raise self.error(f"groups nested more than {MAX_DEPTH} deep")
        branches, loops = [], False
        while True:
            node, loop = self.sequence(depth)
            branches.append(node)
            loops |= loop
            if self.peek() != "|":
                break
            self.at += 1

        def run(path: _Path, mask: int) -> int:
            ends = 0
            for branch in branches:
                ends |= branch(path, mask)
            return ends

        return (branches[0] if len(branches) == 1 else run), loops

    def sequence(self, depth: int) -> tuple[_Node, bool]:
        parts, loops = [], False
        while self.peek() not in ("", "|", ")"):
            node, loop = self.quantified(depth)
            parts.append(node)
            loops |= loop

        def run(path: _Path, mask: int) -> int:
            for part in parts:
                if not mask:
                    break
                mask = part(path, mask)
            return mask

        return run, loops

    def quantified(self, depth: int) -> tuple[_Node, bool]:
        node, loop = self.atom(depth)
        sign = self.peek()
        if sign == "{":
            raise self.error("a counted repeat '{'")
        if sign not in ("*", "+", "?"):
            return node, loop
        if sign != "?" and loop:
            raise self.error("a repeat inside a repeat")
        self.at += 1
        if self.peek() == "?":  # a lazy repeat reaches the same ends
            self.at += 1
        if self.peek() in ("*", "+", "?", "{"):
            raise self.error("a repeat of a repeat")
        if sign == "?":
            return (lambda path, mask: mask | node(path, mask)), loop
        return _closure(node, at_least_one=sign == "+"), True

    def atom(self, depth: int) -> tuple[_Node, bool]:
        char = self.peek()
        if char == "(":
            self.at += 1
            if self.peek() == "?":
                if self.key[self.at : self.at + 2] != "?:":
                    raise self.error("a group that begins with '(?'")
                self.at += 2
            node, loop = self.alternatives(depth + 1)
            if self.peek() != ")":
                raise self.error("an unclosed '('")
            self.at += 1
            return node, loop
        if char in ("^", "$"):
            self.at += 1
            return (lambda path, mask: mask & 1) if char == "^" else (lambda path, mask: mask & path.end), False
        return _single(self.character()), False

    def character(self) -> str:
        """The source text of an atom that matches exactly one character."""
        start, char = self.at, self.peek()
        if char == "\\":
            following = self.key[start + 1 : start + 2]
            if not following or (following.isalnum() and following not in "dDwW"):
                raise self.error("an unknown escape")
            self.at += 2
        elif char == "[":
            close = self.key.find("]", start + 2 + (self.key[start + 1 : start + 2] == "^"))
            inside = self.key[start + 1 : close]
            if close < 0 or "[" in inside or "\\" in inside or len(inside) > 128:
                raise self.error("a character class that is not a plain one")
            self.at = close + 1
        elif char in "*+?{}":
            raise self.error(f"a stray {char!r}")
        else:
            self.at += 1
            return char if char == "." else re.escape(char)
        return self.key[start : self.at]


def _single(atom: str) -> _Node:
    try:
        test = re.compile(atom)
    except re.error as error:
        raise ValueError(f"bad character class {atom!r}: {error}") from None
    return lambda path, mask: (mask & path.occurrences(atom, test)) << 1


def _closure(node: _Node, at_least_one: bool) -> _Node:
    def run(path: _Path, mask: int) -> int:
        frontier = node(path, mask) if at_least_one else mask
        seen = frontier
        while frontier:
            frontier = node(path, frontier) & ~seen
            seen |= frontier
        return seen

    return run
