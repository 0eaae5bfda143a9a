"""Experts that join, are replaced and leave while a server runs: what one worker does of it.

A change is prepared while requests are answered: everything that can be refused is refused there. It is made, by copies
into tensors that are there already, once no request runs and every worker has prepared the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.bank import ExpertBank
from ..files.listing import listed
from ..methods import get_method
from ..methods.base import Plan, Routing
from ..routing.planning import listing
from ..routing.slots import Slots, move_up, no_room, row_of, write_row
from .branch import Branch, PartialBranch, route_options
from .pool import Planned, planned_one, score_bias
from .settings import Settings
from .tables import Tables

Row = dict[str, Tensor | None]


@dataclass(frozen=True)
class Change:
    """source: where the expert `name` is, which joins or takes the place of that of its name; None: it leaves."""

    name: str
    source: str | None = None

    @classmethod
    def read(cls, said: Any) -> Change:
        """What a request for an expert says: {"name": ..., "source": ...}; ValueError for anything else."""
        keys = ("name", "source")
        if not isinstance(said, Mapping) or set(said) != set(keys):
            raise ValueError(f'moerge: expected {{"name": "cat", "source": "path/cat"}}, got {str(said)[:200]}')
        for key in keys:
            text = said[key]
            if not (isinstance(text, str) and text.strip() and text == text.encode(errors="ignore").decode()):
                raise ValueError(f"moerge: {key} must be a text that is not empty, got {str(text)[:100]!r}")
        return cls(said["name"], said["source"])


def change_problem(change: Change, names: tuple[str, ...], slots: int) -> str | None:
    """Why experts of these names cannot be changed so."""
    if change.source is None:
        if change.name not in names:
            return f"no expert {change.name!r}; there are {', '.join(names)}"
        return f"{change.name!r} is the last expert" if len(names) == 1 else None
    if change.name not in names and len(names) == slots:
        return f"all {slots} slots are taken, by {', '.join(names)}: drop one first, or start with more spare slots"
    return None


@dataclass(frozen=True)
class _Prepared:
    """methods: {method: (its routing, its options) after the change}; written: {module: {part: row of a slot}}."""

    change: Change
    methods: dict[str, tuple[Routing, dict[str, Any]]]
    written: dict[str, dict[str, Row]]


class LivePool:
    """The experts of one worker, whose branches have `settings.spare` slots more than there were experts at first.

    names: the experts there are, in the order of their slots
    """

    def __init__(
        self,
        settings: Settings,
        base: Any,
        model: nn.Module,
        names: tuple[str, ...],
        sizes: Mapping[str, tuple[int, int]],
        modules: list[str],
        branches: Mapping[str, Branch],
        tables: Tables,
        share: Callable[[str, Plan], Plan],
    ):
        """base: the model's folder; model: transformers' of it, without weights; modules: all that have experts;
        branches: {module: its branch} of this worker; share: what of a module's plan this worker holds."""
        self.names, self.slots = names, len(names) + settings.spare
        self._settings, self._base, self._model, self._sizes = settings, base, model, sizes
        self._modules, self._branches, self._share = frozenset(modules), dict(branches), share
        self._tables = tables
        chosen = (settings.absent, settings.missing)
        self._rows = {
            name: Slots(settings.spare, get_method(name), options, *chosen)
            for name, options in settings.variants().items()
        }
        self._prepared: _Prepared | None = None

    def prepare(self, change: Change) -> str:
        """Reads and checks what `commit` will write; a digest of it, equal on workers that read the same.

        ValueError that lists everything wrong.
        """
        self._prepared = None
        if problem := change_problem(change, self.names, self.slots):
            raise ValueError(f"moerge: {problem}")
        left = {*self.names, change.name} if change.source is not None else {*self.names} - {change.name}
        try:
            methods = {name: slots.settings(len(left)) for name, slots in self._rows.items()}
        except ValueError as error:
            raise ValueError(f"moerge: {change.name!r} cannot leave: {error}") from None
        if change.source is None:
            self._prepared = _Prepared(change, methods, {})
            return ""
        expert = self._settings.load_one(change.name, change.source, self._base)
        if len(expert) != 1:
            raise ValueError(f"moerge: expected one expert, got {len(expert)}: {', '.join(expert.names)}")
        planned = planned_one(self._settings, expert, self._model, len(left))
        self._prepared = _Prepared(change, methods, self._written(expert, planned))
        return _digest(planned)

    def commit(self) -> tuple[str, ...]:
        """Makes the prepared change, at a moment at which no request runs; the names there are after it."""
        if self._prepared is None:
            raise RuntimeError("moerge: no change of the experts was prepared")
        made, self._prepared = self._prepared, None
        change = made.change
        known, count = change.name in self.names, len(self.names)
        slot = self.names.index(change.name) if known else count
        if change.source is None:
            self.names = tuple(name for name in self.names if name != change.name)
        elif not known:
            self.names = (*self.names, change.name)
        biases = {name: score_bias(self._rows[name].row, options) for name, (_, options) in made.methods.items()}
        self._tables.change(len(self.names), biases)
        for module, branch in self._branches.items():
            for part, stacked in branch.stacked().items():
                if change.source is None:
                    move_up(stacked, slot, count - 1)
                else:
                    write_row(stacked, slot, made.written[module][part])
            features = self._sizes[module][0]
            chosen = {name: routing for name, (routing, _) in made.methods.items()}
            branch.choose({name: route_options(r, features, len(self.names)) for name, r in chosen.items()})
        return self.names

    def abandon(self) -> None:
        """Forgets what was prepared."""
        self._prepared = None

    def _written(self, expert: ExpertBank, methods: list[Planned]) -> dict[str, dict[str, Row]]:
        """{module: {"": factors, method: its own}} for one slot of every branch; ValueError lists what does not fit."""
        problems = []
        if others := [module for module in methods[0].plans if module not in self._modules]:
            problems.append(
                f"{listed([repr(path) for path in others], 'module')}: no expert had them when the server started, "
                "so that there is no room: start it with this expert"
            )
        written: dict[str, dict[str, Row]] = {}
        for module, branch in self._branches.items():
            rows = {made.method.name: self._row(module, branch, made) for made in methods}
            first = rows[methods[0].method.name]
            bank = {key: value for key, value in first.items() if key in ("lora_A", "lora_B", "lora_bias")}
            written[module] = {"": bank} | rows
            if problem := _unfit(branch.stacked()[""], bank):
                problems.append(f"module '{module}': {problem}")
        if problems:
            raise ValueError(listing(f"cannot add expert {expert.names[0]!r}", problems))
        return written

    def _row(self, module: str, branch: Branch, made: Planned) -> Row:
        plan = made.plans.get(module)
        row = row_of(None if plan is None else self._share(module, plan), self._settings.absent)
        if plan is not None and isinstance(branch, PartialBranch):
            row["gate_sums"] = plan.gates.double().sum(1)[0]
        return row


def _unfit(stacked: Mapping[str, Tensor], bank: Row) -> str | None:
    """Why a slot of a branch has no room for the factors of an expert, or not with their values."""
    if problem := no_room(stacked, bank):
        return problem
    for key, value in bank.items():
        if value is not None and key in stacked and not bool(value.to(stacked[key].dtype).isfinite().all()):
            return f"values of {key} do not fit {stacked[key].dtype}, the type of the experts there are"
    return None


def _digest(methods: list[Planned]) -> str:
    found = hashlib.sha256()
    for made in methods:
        for module, plan in sorted(made.plans.items()):
            found.update(f"{made.method.name} {module}".encode())
            for tensor in (plan.lora_A, plan.lora_B, plan.lora_bias, plan.gates, plan.mask):
                if tensor is not None:
                    found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
