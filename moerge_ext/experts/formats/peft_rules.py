"""What a checked LoRA config says of each module: its rank, its scaling, and what is odd about both.

The tensors decide a rank. PEFT takes the first pattern that matches and writes the patterns sorted by name, so a
file does not always tell which one its training used.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .peft_patterns import MAX_WORK, ModulePattern
from .peft_targets import Targets

if TYPE_CHECKING:
    from ..claims import BaseClaims

MAX_PATTERN_PAIRS = 50_000_000  # (patterns) x (modules), some seconds of matching

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
show = _short.repr


def finite_number(value: Any, where: str, problems: list[str]) -> float:
    """The value of the field `where`; 1, and a line in `problems`, when it is no finite number."""
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float
        pass
    problems.append(f"{where} must be a finite number, got {show(value)}")
    return 1.0


@dataclass(frozen=True)
class PatternRow:
    """One entry of `rank_pattern` or `alpha_pattern`; `pattern` is None when its syntax is not read here."""

    key: str
    value: float
    pattern: ModulePattern | None

    def matches(self, path: str) -> bool:
        return self.pattern is not None and self.pattern.matches(path)


@dataclass(frozen=True)
class Alpha:
    """The alpha of one module, and every other the config may mean."""

    value: float
    source: str = "lora_alpha"  # or the key it comes from
    told_by_rank: bool = False  # another comes first in the file
    others: tuple[tuple[str, float], ...] = ()  # (key, alpha) of the other patterns that match, with another value
    unread: tuple[str, ...] = ()  # patterns that cannot be read and would change it


@dataclass(frozen=True)
class LoraRules:
    """A checked LoRA config. `rank` None: it has no `r`. `init`: "pissa" or "olora" when training began by moving a
    part of the base into the factors, else None.
    """

    rank: int | None
    alpha: float
    rslora: bool
    lora_bias: bool
    rank_pattern: tuple[PatternRow, ...]
    alpha_pattern: tuple[PatternRow, ...]
    targets: Targets
    init: str | None
    modules_to_save: tuple[str, ...]
    base_model: str | None
    says: tuple[str, ...] = ()  # what is odd about the config itself
    parameters: tuple[str, ...] = ()  # target_parameters

    def rank_problem(self, path: str, rank: int) -> str | None:
        """Why the tensors' rank cannot be of this config: neither the first matching pattern, nor one that another
        order or a pattern outside our syntax would have chosen.
        """
        if rank == self.rank and not self.rank_pattern:
            return None
        matching = [row for row in self.rank_pattern if row.matches(path)]
        first, source = (matching[0].value, f"rank_pattern {show(matching[0].key)}") if matching else (self.rank, "r")
        possible = {first} | {row.value for row in matching}
        possible |= {row.value for row in self.rank_pattern if row.pattern is None}
        if first is None or rank in possible:
            return None
        return f"the config says rank {first} ({source}), the tensors have {rank}"

    def first_rank(self, path: str) -> int | None:
        """What PEFT would make: the first pattern that matches, or r."""
        return next((int(row.value) for row in self.rank_pattern if row.matches(path)), self.rank)

    def alpha_of(self, path: str, rank: int) -> Alpha:
        """PEFT's choice, the first pattern that matches; or the one whose twin in `rank_pattern` has the tensors' rank
        where another has a different one.
        """
        if not self.alpha_pattern:
            return Alpha(self.alpha)
        matching = [row for row in self.alpha_pattern if row.matches(path)]
        unread = [row for row in self.alpha_pattern if row.pattern is None]
        if not matching:
            return Alpha(self.alpha, unread=_keys_of(unread, self.alpha))
        chosen, sure = matching[0], False
        if len({row.value for row in matching}) > 1 and (twins := self._told_by_rank(path, rank)):
            told = next((row for row in matching if row.key in twins), chosen)
            chosen, sure = told, told is chosen and told.key in twins
        others = () if sure else tuple((row.key, row.value) for row in matching if row.value != chosen.value)
        return Alpha(chosen.value, chosen.key, chosen is not matching[0], others, _keys_of(unread, chosen.value))

    def _told_by_rank(self, path: str, rank: int) -> set[str]:
        """The patterns that would give the tensors' rank, when others that match would not."""
        ranks = [row for row in self.rank_pattern if row.matches(path)]
        keys = {row.key for row in ranks if row.value == rank}
        return keys if len(keys) < len(ranks) else set()

    def scaling(self, alpha: float, rank: int) -> float:
        """alpha/r, or alpha/sqrt(r) with rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def notes(self, alphas: Mapping[str, Alpha], claims: BaseClaims) -> list[str]:
        """What is odd and no reason to refuse, of modules {path: alpha} and of what was saved beside them."""
        found = list(self.says)
        if names := self.targets.unused([*alphas, *claims.whole()]):
            found.append(f"target_modules names {show(names)}, of which the file has no weights")
        for field, rows in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            # a pattern that is not read may fit
            keys = [r.key for r in rows if r.pattern is not None and not any(r.matches(path) for path in alphas)]
            if keys:
                found.append(f"{field} has {show(keys)}, which fits none of the file's modules")
        if self.modules_to_save and not any(_holds(name, claims.saved) for name in self.modules_to_save):
            found.append(
                f"modules_to_save names {show(list(self.modules_to_save))}, of which the file holds nothing: the "
                "model's own are used"
            )
        return found + _ambiguous(alphas)

    def work_problems(self, paths: Collection[str]) -> list[str]:
        """A reason to refuse when matching every pattern against every module would take too long."""
        patterns = [row.pattern for row in (*self.rank_pattern, *self.alpha_pattern) if row.pattern is not None]
        work = sum(pattern.cost for pattern in patterns) * sum(len(path) for path in paths)
        if work > MAX_WORK or len(patterns) * len(paths) > MAX_PATTERN_PAIRS:
            return [
                f"rank_pattern and alpha_pattern hold {len(patterns)} patterns for {len(paths)} modules: "
                "too many to match"
            ]
        return []


def _keys_of(rows: Sequence[PatternRow], value: float) -> tuple[str, ...]:
    """The patterns of another value."""
    return tuple(row.key for row in rows if row.value != value)


def _ambiguous(alphas: Mapping[str, Alpha]) -> list[str]:
    """One line for all modules whose alpha another order of the patterns would change."""
    groups: dict[Alpha, list[str]] = {}
    for path, alpha in alphas.items():
        if alpha.others:
            groups.setdefault(alpha, []).append(path)
    lines = []
    for alpha, paths in groups.items():
        others = ", ".join(f"{show(key)} ({value:g})" for key, value in alpha.others)
        why = "as the rank of the tensors says" if alpha.told_by_rank else "as PEFT does when it loads the file"
        lines.append(
            f"alpha_pattern is ambiguous for {some_of(paths)}: {show(alpha.source)} ({alpha.value:g}) is taken, {why}, "
            f"and {others} matches too (PEFT takes the first that matches and sorts them when it saves, so the file "
            "does not tell the order of the training)"
        )
    return lines


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _holds(module: str, saved: Collection[str]) -> bool:
    """Whether one of the saved parameters lies in `module`."""
    return any(lies_in(path, module) for path in saved)


def lies_in(path: str, module: str) -> bool:
    """Whether a parameter is one of a module that `modules_to_save` means by `module`: the end of its path, of which
    PEFT does not ask that it begins with a dot ("norm" is input_layernorm too)."""
    return f"{module}." in path
