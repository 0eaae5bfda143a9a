"""What `moerge inspect` writes of an inspection, and what it takes from an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.kept import check_replaced
from ..files.rows import read_json
from ..methods.fixed import PREFIX


def record(i: Any, score: float | None) -> dict[str, Any]:
    """One row of inspect.json: an `Inspection` and the score of its method on its task."""
    return {
        "method": i.method,
        "task": i.task,
        "oracle": i.oracle,
        "entropy": i.entropy,
        "kl_oracle_routing": i.divergence,
        "kl_oracle_token_mean": i.token_divergence,
        "weight_of_oracle": i.to_oracle,
        "score": score,
        "modules": {name: (m.distribution / m.tokens).tolist() for name, m in i.modules.items()},
    }


def read_results(path: Path) -> list[dict]:
    """The rows of a results.json; ValueError when it is none."""
    rows = read_json(path, "the results.json of `moerge eval`")
    try:
        return [{key: row[key] for key in ("method", "task", "score")} for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no results.json of `moerge eval`") from error


def check_same_oracles(file: Path, oracles: Mapping[str, str | None], *, overwrite: bool) -> None:
    """ValueError where `file`, an inspect.json that is there, measures the distance from other oracles than these."""
    if overwrite or not file.is_file():
        return
    try:
        rows = {row["task"]: row["oracle"] for row in read_json(file, "an inspect.json")["rows"]}
    except (ValueError, KeyError, TypeError):  # of something else, which is looked at elsewhere
        return
    here = {task: oracles.get(task) for task, oracle in rows.items() if oracle is not None}
    if other := [
        f"of {task} {rows[task]} there, {oracle} here" for task, oracle in here.items() if oracle != rows[task]
    ]:
        check_replaced(file, f"with other oracles ({'; '.join(other)})")


def best_experts(results: list[dict]) -> dict[str, str]:
    """{task: its best expert} from the `expert:<name>` rows, of tasks in which not all of several score the same."""
    by_task: dict[str, dict[str, float]] = {}
    for row in results:
        if row["method"].startswith(PREFIX):
            by_task.setdefault(row["task"], {})[row["method"][len(PREFIX) :]] = row["score"]
    tied = {task for task, scores in by_task.items() if len(scores) > 1 and len(set(scores.values())) == 1}
    return {task: max(scores, key=scores.get) for task, scores in by_task.items() if task not in tied}
