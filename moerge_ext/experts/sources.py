"""From adapters to stacked tensors: everything is checked before anything is allocated, and copied once."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from ..files.counting import counted
from ..files.listing import grouped
from ..files.safefile import AdapterError
from ..models.wrappers import unwrapped
from .branches import Rows
from .claims import BaseClaims
from .fingerprint import Fingerprint
from .formats import inspect_adapter
from .formats.adapter import LoraWeights, ModuleHeader, ModuleWeights
from .formats.layer_sizes import fill_sizes, layer_size
from .formats.peft import GateSet, common_dtype, nonfinite_problems
from .gate_files import Gates, gate_places, has_noted_gates, stale_note, stale_note_of, with_gates
from .hub import find_adapter
from .live_peft import is_peft_model, live_adapters
from .memory import memory_problem, padding_note
from .module_bank import ModuleBank
from .selection import Selection
from .stacks import Stack

PROGRESS_AFTER = 2.5  # seconds
MAX_LISTED = 20  # problems shown per expert when several are refused; `problems` holds all
# Padding ranks to the largest multiplies memory. Beyond this factor over what the files hold, and beyond the
# free allowance, one expert of a huge rank is inflating the whole bank.
MAX_PADDING = 64
FREE_PADDING = 1 << 30  # bytes


class Source(Protocol):
    """A checked adapter that can be read module by module: AdapterHeader or LiveAdapter."""

    name: str
    folder: Path | None
    base_model: str | None
    modules: dict[str, ModuleHeader]
    gates: dict[str, GateSet]
    notes: list[str]
    claims: BaseClaims

    def read(self) -> Iterator[tuple[str, ModuleWeights]]: ...


def collect_sources(
    paths: Any, selection: Selection, base: Any = None, gates: Gates = None
) -> tuple[list[Source], dict[str, Path]]:
    """(every expert, checked alone and beside the others; where `gates` of which lie). ValueError lists all problems
    of all of them.
    """
    bad: dict[str, list[str]] = {}
    if isinstance(paths, nn.Module):
        paths = unwrapped(paths)
        if not is_peft_model(paths):
            raise ValueError(
                f"load_experts: {type(paths).__name__} has no PEFT adapters; pass a PeftModel, paths, or {{name: path}}"
            )
        sources, bad = live_adapters(paths, selection)
        total = len(sources) + len(bad)
    else:
        named = _named_folders(paths, bad, selection)
        total = len(named) + len(bad)
        sources = []
        part = {} if selection.keeps is None else {"keep": selection.keeps}
        for name, folder in tqdm(named.items(), "checking experts", delay=PROGRESS_AFTER, leave=False):
            try:
                sources.append(inspect_adapter(name, folder, base, **part))
            except AdapterError as error:
                bad[f"{name!r} ({folder})"] = error.problems
    if not sources and not bad:
        raise ValueError("load_experts: no experts were given; expected paths, {name: path} or a PeftModel")
    fill_sizes(sources, base)
    places = gate_places(gates, [source.name for source in sources], complete=not bad)
    model = paths if isinstance(paths, nn.Module) else None
    sources = _with_gates(sources, places, selection, partial(_whole, model, base), bad)
    sources, unnamed = selection.rename(sources, complete=not bad)
    bad |= unnamed | {repr(name): said for name, said in fill_sizes(sources, base).items()}
    bad |= _misfits(sources, base)
    if bad:
        # all are refused now, so what reading them would find belongs to the list
        for source in tqdm(sources, "looking for NaN", delay=PROGRESS_AFTER, leave=False):
            bad.setdefault(repr(source.name), []).extend(_stored_problems(source))
        raise _refusal({name: problems for name, problems in bad.items() if problems}, total)
    _check_padding(sources)
    return sources, places


def _whole(model: nn.Module | None, base: Any, source: Source) -> Source:
    """The source with all its modules, whatever was selected. AdapterError when the rest of it is not right."""
    if model is None:
        header = inspect_adapter(source.name, source.path, base)
        fill_sizes([header], base)
        return header
    found, bad = live_adapters(model, Selection(names=[source.name]))
    if bad:
        raise AdapterError([problem for problems in bad.values() for problem in problems])
    return found[0]


def _with_gates(
    sources: list[Source],
    places: Mapping[str, Path],
    selection: Selection,
    whole: Callable[[Source], Source],
    bad: dict[str, list[str]],
) -> list[Source]:
    """The sources with gates from elsewhere; those that cannot be used go to `bad`. Stale gates are noted."""
    found = []
    for source in sources:
        all_of_it = (lambda source=source: source) if selection.keeps is None else partial(whole, source)
        try:
            if source.name in places:
                source = with_gates(source, places[source.name], selection.keeps, all_of_it)
            # of whole adapters `stack_modules` knows it, which reads them anyway
            if selection.keeps is not None and (note := stale_note(source, all_of_it)):
                source.notes.append(note)
            found.append(source)
        except AdapterError as error:
            bad.setdefault(repr(source.name), []).extend(error.problems)
    return found


def _stored_problems(source: Source) -> list[str]:
    """NaN and inf in the file of one expert."""
    try:
        return [p for path, w in source.read() for p in nonfinite_problems(path, w)]
    except ValueError as error:
        return [str(error)]


def _named_folders(paths: Any, bad: dict[str, list[str]], selection: Selection) -> dict[str, Path]:
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if isinstance(paths, Mapping):
        pairs = list(paths.items())
        if wrong := [name for name, _ in pairs if not isinstance(name, str) or not name]:
            raise ValueError(f"load_experts: expert names must be non-empty strings, got {wrong}")
        pairs = [(name, paths[name]) for name in selection.choose(list(paths))]
    elif isinstance(paths, Iterable):
        pairs = [(None, path) for path in paths]
    else:
        raise ValueError(f"load_experts: expected paths, {{name: path}} or a PeftModel, got {type(paths).__name__}")
    found: list[tuple[str, Path]] = []
    for name, path in pairs:
        try:
            default, folder = find_adapter(path)
        except ValueError as error:
            told = repr(str(path)[:200]) if isinstance(path, (str, bytes, os.PathLike)) else f"<{type(path).__name__}>"
            bad[repr(name) if name else told] = [str(error)]
            continue
        found.append((name or default, folder))
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            folders = ", ".join(str(folder) for other, folder in found if other == name)
            bad[repr(name)] = [f"{count} experts have this name ({folders}); pass {{name: path}} to name them apart"]
    named = dict(found)
    if selection.names is not None:
        named = {
            name: named[name] for name in selection.choose(list(named) + [n for n, _ in pairs if n]) if name in named
        }
        for said in set(bad) - {repr(name) for name in selection.names}:
            del bad[said]
    return named


def _refusal(bad: Mapping[str, Sequence[str]], total: int) -> AdapterError:
    """One error for all experts; `problems` holds a line per problem, the expert's name in front."""
    problems = [f"expert {name}: {problem}" for name, reasons in bad.items() for problem in reasons]
    error = AdapterError(problems, f"load_experts: {len(bad)} of {counted(total, 'expert')} cannot be used")
    if len(bad) > 1:  # a long list for one expert must not hide another
        lines = []
        for name, reasons in bad.items():
            lines.append(f"\nexpert {name}:")
            causes = grouped(reasons)
            lines += [f"\n  - {cause}" for cause in causes[:MAX_LISTED]]
            if len(causes) > MAX_LISTED:
                lines.append(f"\n  - ... and {len(causes) - MAX_LISTED} more problems")
        error.args = (f"load_experts: {len(bad)} of {counted(total, 'expert')} cannot be used:" + "".join(lines),)
    if total > len(bad):
        error.args = (f"{error.args[0]}\n(names=[...] loads the others without them)",)
    return error


def _misfits(sources: Sequence[Source], base: Any = None) -> dict[str, list[str]]:
    """{expert: what is wrong}, one line each, for experts whose modules have another D or O than the layers of the base
    or, where these are not known, than most experts'.
    """
    size_of = None
    differing: dict[int, list[str]] = {}
    agreeing: dict[int, set[int]] = {}
    for path, every in _by_module(sources).items():
        holders = [(e, m) for e, m in every if m.in_features and m.out_features]
        if not holders:
            continue
        shapes = Counter((m.out_features, m.in_features) for _, m in holders)
        if len(shapes) == 1:
            continue
        (usual, count), *_ = shapes.most_common()
        size_of = layer_size(base) if size_of is None else size_of
        if size := size_of(path):
            usual = size[::-1]
        there = "the model has" if size else f"in {count} other expert(s) for"
        for e, module in holders:
            shape = (module.out_features, module.in_features)
            if shape != usual:
                differing.setdefault(e, []).append(
                    f"{path} is for a layer [O={shape[0]}, D={shape[1]}], {there} [O={usual[0]}, D={usual[1]}]"
                )
                agreeing.setdefault(e, set()).update(o for o, m in holders if (m.out_features, m.in_features) == usual)
    bad = {}
    for e, said in differing.items():
        more = f"; {len(said)} of its {len(sources[e].modules)} modules differ" if len(said) > 1 else ""
        theirs = sorted({sources[o].base_model or "one they do not name" for o in agreeing[e]})
        others = f", the others for {', '.join(theirs)}" if theirs else ""
        bases = f"made for {sources[e].base_model or 'a model it does not name'}{others}: "
        bad[repr(sources[e].name)] = [bases + said[0] + more]
    return bad


def _check_padding(sources: Sequence[Source]) -> None:
    """AdapterError, naming the expert to blame, when one huge rank would inflate everybody's stack."""
    total_stored = total_padded = 0
    worst = (0, "", 0, 0)  # bytes of padding, module, expert id, rank
    for path, holders in _by_module(sources).items():
        stored = sum(module.nbytes for _, module in holders)
        e, widest = max(holders, key=lambda item: item[1].rank)
        element = max(module.dtype.itemsize for _, module in holders)
        padded = len(sources) * widest.rank * (widest.in_features + widest.out_features) * element
        total_stored, total_padded = total_stored + stored, total_padded + padded
        worst = max(worst, (padded - stored, path, e, widest.rank))
    if total_padded > MAX_PADDING * total_stored + FREE_PADDING:
        _, path, e, rank = worst
        problem = (
            f"{path}: padding all {len(sources)} experts to its rank {rank} makes the bank "
            f"{total_padded / 2**30:.1f} GiB, {total_padded // total_stored} times what the adapters hold; "
            "load it apart, the others with names=[...]"
        )
        raise _refusal({repr(sources[e].name): [problem]}, len(sources))


def _by_module(sources: Sequence[Source]) -> dict[str, list[tuple[int, ModuleHeader]]]:
    """{module path: [(expert id, header)]}, paths in natural order (layer 2 before layer 10)."""
    found: dict[str, list[tuple[int, ModuleHeader]]] = {}
    for e, source in enumerate(sources):
        for path, module in source.modules.items():
            found.setdefault(path, []).append((e, module))
    return {path: found[path] for path in sorted(found, key=_natural)}


def _natural(path: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", path)
    # digits beyond any layer count are compared as text: int() of a very long run is slow
    return [
        (0, int(part), "") if part.isascii() and part.isdigit() and len(part) < 19 else (1, 0, part) for part in parts
    ]


def exact_dtype(modules: Sequence[ModuleHeader]) -> torch.dtype:
    """The smallest dtype that holds all weights with their scaling folded in, without rounding.

    16 bits stay 16 bits when every scaling is 0 or a power of two; float16 needs 1 or more, as its small
    values lose bits when they become smaller.
    """
    dtype = common_dtype(module.dtype for module in modules)
    if dtype.itemsize > 2:
        return dtype
    least = 1.0 if dtype == torch.float16 else 0.0
    scalings = {abs(module.scaling) for module in modules} - {0.0}
    exact = all(math.frexp(scaling)[0] == 0.5 and scaling >= least for scaling in scalings)
    return dtype if exact else torch.float32


def stack_modules(
    sources: Sequence[Source], dtype: torch.dtype | None, device: torch.device, *, whole: bool = True
) -> dict[str, ModuleBank]:
    """Allocate every module's stack once, then copy expert by expert. AdapterError for NaN, inf and overflow.

    whole: the sources have all their modules, so that gates which were made for other weights can be noted.
    """
    holders = _by_module(sources)
    target = dtype or exact_dtype([m for source in sources for m in source.modules.values()])
    names = [source.name for source in sources]
    if problem := memory_problem(names, holders, target, device):
        raise AdapterError([problem], "load_experts: the experts cannot be stacked")
    if note := padding_note(names, holders, target):
        warnings.warn(f"load_experts: {note}", stacklevel=3)
    stacks = {path: Stack(held, len(sources), target, device) for path, held in holders.items()}
    others: dict[str, Rows] = {path: {} for path in holders}
    bad = _copy_in(sources, stacks, others, whole)
    suspects = {e for stack in stacks.values() for e in stack.finish()}
    suspects |= {e for rows in others.values() for e in rows}
    for e in sorted(suspects):
        if repr(names[e]) in bad:  # cut off: its rows were not all written
            continue
        try:
            problems = [p for path, w in sources[e].read() for p in _value_problems(stacks[path], e, path, w)]
        except ValueError as error:
            problems = [str(error)]
        if problems:
            bad[repr(names[e])] = problems
    if bad:
        raise _refusal(bad, len(sources))
    return {path: stack.bank(others[path]) for path, stack in stacks.items()}


def _copy_in(
    sources: Sequence[Source], stacks: Mapping[str, Stack], others: Mapping[str, Rows], whole: bool
) -> dict[str, list[str]]:
    """Copies every expert; {expert: what is wrong} of those whose file changed since it was checked."""
    bad: dict[str, list[str]] = {}
    total = sum(module.nbytes for source in sources for module in source.modules.values())
    options = {"unit": "B", "unit_scale": True, "delay": PROGRESS_AFTER, "leave": False}
    with tqdm(total=total, desc="loading experts", **options) as bar:
        for e, source in enumerate(sources):
            own = Fingerprint() if whole and has_noted_gates(source) else None
            stored = getattr(source, "stored_paths", {})
            try:
                for path, weights in source.read():
                    if isinstance(weights, LoraWeights):
                        stacks[path].put(e, weights)
                    else:
                        others[path][e] = weights.copy()
                    if own is not None:
                        own.add(stored.get(path, path), weights)
                    bar.update(source.modules[path].nbytes)
            except ValueError as error:
                bad[repr(source.name)] = [str(error)]
                continue
            if own is not None and (note := stale_note_of(source, own.digest())):
                source.notes.append(note)
    return bad


def _value_problems(stack: Stack, e: int, path: str, weights: ModuleWeights) -> list[str]:
    """What is wrong with the values of one module of one expert: as stored, or once scaled and cast."""
    problems = nonfinite_problems(path, weights)
    if problems or not isinstance(weights, LoraWeights):
        return problems or [
            f"{path}: {part} does not fit float32"
            for part, tensor in weights.parts().items()
            if not torch.isfinite(tensor.float()).all()
        ]
    dtype = stack.lora_a.dtype
    hint = "; pass dtype=torch.float32" if dtype == torch.float16 else ""
    return [
        f"{path}: {part} does not fit {dtype} (scaling {weights.scaling:g} folded into lora_B and bias){hint}"
        for part in stack.overflows(e)
    ]
