"""The data of routers: a task's, or that of every expert side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...experts.selection import alone
from ...methods.base import Method
from ..batches import Batch, BatchSource
from ..encoding import Prepared, prepare


def check_data(row: Method, names: Sequence[str], data: Any, expert_data: Mapping[str, Any] | None) -> None:
    """ValueError for data that the method does not take, and for data that it lacks, by the experts' names."""
    by_expert, said = row.learned.loss == "tasks", f"method '{row.name}'"
    if expert_data is not None and not (by_expert or row.learned.own_data):
        raise ValueError(f"{said} takes no data of single experts: leave expert_data out, or put it into data (--data)")
    if by_expert and (expert_data is None or data is not None):
        raise ValueError(
            f"{said} is trained on every expert's data: pass expert_data={{name: rows}} "
            "(--expert-data NAME=FILE), and no data (--data)"
        )
    if not by_expert and data is None:
        raise ValueError(f"{said} is trained on the data of a task: pass data (--data)")
    if expert_data is None:
        return
    lost, more = sorted(set(names) - expert_data.keys()), sorted(expert_data.keys() - set(names))
    if lost or more:
        rest = [name for name in names if name not in lost]
        hint = f": {alone(rest)} trains without {'it' if len(lost) == 1 else 'them'}" if lost and len(rest) > 1 else ""
        problems = [f"there is none of {', '.join(lost)}{hint}"] * bool(lost)
        problems += [f"{', '.join(more)} is no expert"] * bool(more)
        raise ValueError(f"expert_data must have the data of every expert ({', '.join(names)}); {'; '.join(problems)}")


def prepared_by_expert(
    model: Any, names: Sequence[str], expert_data: Mapping[str, Any], **options: Any
) -> dict[str, Prepared]:
    """{expert: its data, encoded}, in the order of `names`."""
    found = {}
    for name in names:
        try:
            found[name] = prepare(model, expert_data[name], None, **options)
        except ValueError as error:
            raise ValueError(f"the data of expert '{name}': {error}") from error
    return found


def single_examples(prepared: Prepared) -> Iterator[Batch]:
    """Batches of one example each; ready batches as they are."""
    for feature in prepared.data:
        yield feature if prepared.collate_fn is None else prepared.collate_fn([feature])


def side_by_side(prepared: Mapping[str, Prepared], batch_size: int, shuffle: bool, seed: int) -> BatchSource:
    """Batches {"tasks": [one of each expert]}; a shorter data set begins again until the longest is through."""
    parts = list(prepared.values())
    sets = [part.data if hasattr(part.data, "__getitem__") else list(part.data) for part in parts]
    if any(len(one) == 0 for one in sets):
        raise ValueError("expert_data: every expert needs an example at least")
    zipped = [tuple(one[i % len(one)] for one in sets) for i in range(max(map(len, sets)))]
    if parts[0].collate_fn is None:
        return BatchSource([{"tasks": list(batches)} for batches in zipped])

    def collate(features: list[tuple]) -> Batch:
        return {"tasks": [part.collate_fn(list(f)) for part, f in zip(parts, zip(*features, strict=True), strict=True)]}

    digests = [part.digest for part in parts]
    digest = None if None in digests else hashlib.sha256("".join(digests).encode()).hexdigest()
    return BatchSource(zipped, collate_fn=collate, batch_size=batch_size, shuffle=shuffle, seed=seed, digest=digest)
