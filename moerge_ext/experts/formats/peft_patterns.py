"""Module names and patterns of adapter configs (`rank_pattern`, `alpha_pattern`, `target_modules`,
`exclude_modules`), matched in bounded time.

PEFT matches a pattern `key` against a module path as the regular expression `(.*\\.)?(key)$`, and such keys
come from a file we do not trust: a backtracking engine can be made to run for years. This module accepts the
part of the syntax that names modules (literals, `.`, `\\.`, `\\d`, `\\w`, `[...]`, groups, `|`, `?`, `*`,
`+`, `^`, `$`; in `rank_pattern` and `alpha_pattern`, which must be read, also `{m,n}`, `\\b`, look-ahead and
look-behind) and follows all possible matches at once: the set of reachable positions in the path is one integer, a
bit per position, so a match costs (pattern length) x (path length) at most and cannot blow up. A look-ahead is the
pattern followed backwards from every position.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache

MAX_PATTERN = 1024  # characters
MAX_DEPTH = 8  # nested groups
MAX_REPEAT = 100  # of a counted repeat
MAX_WORK = 100_000_000  # (characters of patterns with operators) x (characters of paths), some seconds

_PLAIN = re.compile(r"\^?[A-Za-z0-9_.\-]+\$?")
_COUNTS = re.compile(r"\{([0-9]{0,4})(,?)([0-9]{0,4})\}")
_WORD = re.compile(r"\w")
# A node maps (path, set of start positions, back=False) to the set of positions where a match of it can end; and
# (path, set of end positions, back=True) to those where one can start.
_Node = Callable[["_Path", int, bool], int]


class _Path:
    """A module path with, for every kind of character asked for, the set of positions that hold it."""

    def __init__(self, text: str):
        self.text = text
        self.end = 1 << len(text)
        self.everywhere = 2 * self.end - 1
        self._occurrences: dict[str, int] = {}

    def occurrences(self, atom: str, test: re.Pattern[str]) -> int:
        if atom not in self._occurrences:
            bits = (1 << i for i, char in enumerate(self.text) if test.fullmatch(char))
            self._occurrences[atom] = sum(bits)
        return self._occurrences[atom]

    def boundaries(self) -> int:
        """The positions between a character of a word and one that is none."""
        words = self.occurrences(r"\w", _WORD)
        return (words ^ (words << 1)) & self.everywhere


class ModulePattern:
    """One pattern over module paths. Raises ValueError for a key outside the accepted syntax, which is `wide` with
    counted repeats, word boundaries and look-around.
    """

    def __init__(self, key: str, wide: bool = False):
        if not key or len(key) > MAX_PATTERN:
            raise ValueError(f"a pattern must have 1 to {MAX_PATTERN} characters, got {len(key)}")
        self.key = key
        self._plain = key.strip("^$") if _PLAIN.fullmatch(key) else None
        self._anchored = key.startswith("^")
        self.cost = 0  # per character of a path; a literal with wildcards costs nothing to speak of
        self._node = None
        if self._plain is None:
            parser = _Parser(key, wide)
            self._node = parser.parse()
            self.cost = len(key) * parser.repeats

    def matches(self, path: str) -> bool:
        """Whether PEFT's rule `(.*\\.)?(key)$` matches `path` from its start."""
        if self._plain is not None:
            return self._matches_plain(path)
        starts = 1 | sum(1 << (i + 1) for i, char in enumerate(path) if char == ".")
        target = _Path(path)
        return bool(self._node(target, starts, False) & target.end)

    def fits_all_of(self, path: str) -> bool:
        """Whether the pattern matches the whole path, PEFT's rule for `target_modules` as a string."""
        if self._plain is not None:
            return len(path) == len(self._plain) and self._matches_plain(path)
        target = _Path(path)
        return bool(self._node(target, 1, False) & target.end)

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
        return self._pattern.cost * sum(len(path) for path in paths) <= MAX_WORK

    def match(self, path: str) -> bool:
        if self._pattern is not None:
            return self._pattern.fits_all_of(path)
        return not self.names.isdisjoint(_ends(path))

    def unused(self, paths: Collection[str]) -> list[str]:
        """The listed names that fit none of the paths."""
        if self.names is None:
            return []
        return sorted(self.names - {end for path in paths for end in _ends(path)})


@lru_cache(maxsize=1 << 14)
def _ends(path: str) -> tuple[str, ...]:
    parts = path.split(".")
    return tuple(".".join(parts[i:]) for i in range(len(parts)))


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

    def __init__(self, key: str, wide: bool):
        self.key, self.wide = key, wide
        self.at = 0
        self.repeats = 1  # the largest count

    def parse(self) -> _Node:
        node, _ = self.alternatives(0)
        if self.at < len(self.key):
            raise self.error("unbalanced ')'")
        return node

    def error(self, what: str) -> ValueError:
        return ValueError(f"{what} at character {self.at}; only simple patterns over module names are read")

    def peek(self) -> str:
        return self.key[self.at] if self.at < len(self.key) else ""

    def only_if_wide(self, what: str) -> None:
        if not self.wide:
            raise self.error(what)

    def take(self, text: str) -> bool:
        """Whether `text` comes next; it is passed over then."""
        found = self.key.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self, depth: int) -> tuple[_Node, bool]:
        if depth > MAX_DEPTH:
            raise self.error(f"groups nested more than {MAX_DEPTH} deep")
        branches, loops = [], False
        while True:
            node, loop = self.sequence(depth)
            branches.append(node)
            loops |= loop
            if not self.take("|"):
                break

        def run(path: _Path, mask: int, back: bool) -> int:
            found = 0
            for branch in branches:
                found |= branch(path, mask, back)
            return found

        return (branches[0] if len(branches) == 1 else run), loops

    def sequence(self, depth: int) -> tuple[_Node, bool]:
        parts, loops = [], False
        while self.peek() not in ("", "|", ")"):
            node, loop = self.quantified(depth)
            parts.append(node)
            loops |= loop

        def run(path: _Path, mask: int, back: bool) -> int:
            for part in reversed(parts) if back else parts:
                if not mask:
                    break
                mask = part(path, mask, back)
            return mask

        return run, loops

    def quantified(self, depth: int) -> tuple[_Node, bool]:
        node, loop = self.atom(depth)
        counts = self.counts()
        if counts is None:
            return node, loop
        if counts != (0, 1) and loop:
            raise self.error("a repeat inside a repeat")
        self.take("?")  # a lazy repeat reaches the same ends
        if self.peek() in ("*", "+", "?", "{"):
            raise self.error("a repeat of a repeat")
        return _repeated(node, *counts), loop or counts != (0, 1)

    def counts(self) -> tuple[int, int | None] | None:
        """(least, most) of the repeat that comes next; most None: without end. None: no repeat."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return counts
        if self.peek() != "{":
            return None
        found = _COUNTS.match(self.key, self.at)
        if not found or not (found[1] or found[3]):
            raise self.error("a stray '{'")
        self.only_if_wide("a counted repeat")
        least = int(found[1] or 0)
        most = least if not found[2] else int(found[3]) if found[3] else None
        if max(least, most or 0) > MAX_REPEAT or (most is not None and most < least):
            raise self.error(f"a counted repeat that is not of 0 to {MAX_REPEAT}")
        self.at = found.end()
        self.repeats = max(self.repeats, least, most or 0)
        return least, most

    def atom(self, depth: int) -> tuple[_Node, bool]:
        if self.take("("):
            return self.group(depth)
        if self.take("^"):
            return (lambda path, mask, back: mask & 1), False
        if self.take("$"):
            return (lambda path, mask, back: mask & path.end), False
        for sign, flip in ((r"\b", 0), (r"\B", -1)):
            if self.take(sign):
                self.only_if_wide("a word boundary")
                return (lambda path, mask, back, flip=flip: mask & (path.boundaries() ^ flip)), False
        return _single(self.character()), False

    def group(self, depth: int) -> tuple[_Node, bool]:
        signs = ("?:", "?=", "?!", "?<=", "?<!")
        sign = next((sign for sign in signs if self.take(sign)), "")
        if not sign and self.peek() == "?":
            raise self.error("a group that begins with '(?'")
        if sign not in ("", "?:"):
            self.only_if_wide("look-around")
        node, loop = self.alternatives(depth + 1)
        if not self.take(")"):
            raise self.error("an unclosed '('")
        if sign in ("", "?:"):
            return node, loop
        return _look(node, ahead="<" not in sign, wanted="!" not in sign), loop

    def character(self) -> str:
        """The source text of an atom that matches exactly one character."""
        start, char = self.at, self.peek()
        if char == "\\":
            self.escape()
        elif char == "[":
            self.at += 1
            self.take("^")
            while self.peek() != "]" or self.key[start : self.at] in ("[", "[^"):
                if self.peek() in ("", "[") or self.at - start > 128:
                    raise self.error("a character class that is not a plain one")
                if self.peek() == "\\":
                    self.escape()
                else:
                    self.at += 1
            self.at += 1
        elif char in "*+?{}":
            raise self.error(f"a stray {char!r}")
        else:
            self.at += 1
            return char if char == "." else re.escape(char)
        return self.key[start : self.at]

    def escape(self) -> None:
        following = self.key[self.at + 1 : self.at + 2]
        if not following or (following.isalnum() and following not in "dDwWsS"):
            raise self.error("an unknown escape")
        self.at += 2


@lru_cache(maxsize=1024)
def _single(atom: str) -> _Node:
    try:
        test = re.compile(atom)
    except re.error as error:
        raise ValueError(f"bad character class {atom!r}: {error}") from None

    def run(path: _Path, mask: int, back: bool) -> int:
        held = path.occurrences(atom, test)
        return (mask >> 1) & held if back else (mask & held) << 1

    return run


def _look(node: _Node, ahead: bool, wanted: bool) -> _Node:
    def run(path: _Path, mask: int, back: bool) -> int:
        held = node(path, path.everywhere, ahead)
        return mask & (held if wanted else ~held)

    return run


def _repeated(node: _Node, least: int, most: int | None) -> _Node:
    def run(path: _Path, mask: int, back: bool) -> int:
        for _ in range(least):
            mask = node(path, mask, back)
        seen = frontier = mask
        left = most - least if most is not None else -1
        while frontier and left:
            frontier = node(path, frontier, back) & ~seen
            seen |= frontier
            left -= 1
        return seen

    return run
