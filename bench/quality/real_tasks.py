"""The tasks as they are asked: a chunk of each one's rows in random order, with choices where there are few."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bench.quality import real

SHOTS, SOLVED = 3, 20  # solved rows before a question; kept beside the task for methods that decide for all of it


def write_task(
    places: real.Places, name: str, chunk: int, size: int, split: str = "test", shots: bool = False
) -> Path | None:
    """The folder of rows `chunk` * `size` and on of a task's split, whatever the split as its test.jsonl.

    shots: every row also has a field of that name, with solved rows of train.jsonl. None when earlier chunks hold all.
    """
    part = {"test": f"{chunk}", "validation": f"{split}-{chunk}"}[split] + "-shots" * shots
    folder = places.cache / f"tasks-{size}" / part / name
    meta = json.loads((places.source(name) / "meta.json").read_text(encoding="utf-8"))
    rows = places.rows(name, split)
    targets = sorted({row["target"] for row in rows})
    rng = random.Random(chunk)
    rows = random.Random(0).sample(rows, len(rows))[chunk * size : (chunk + 1) * size]
    if not rows:
        return None
    if len(targets) <= real.FEW_CHOICES:
        meta |= {"metric": "rank", "choices": targets}
    elif name in real.HELD_OUT and meta["metric"] == "exact_match" and len(targets) <= real.CLOSED:
        meta["metric"] = "rank"
        for row in rows:
            others = rng.sample([target for target in targets if target != row["target"]], real.CHOICES - 1)
            row["choices"] = rng.sample([row["target"], *others], real.CHOICES)
    solved = _solved(places, name)
    if shots:
        for row in rows:
            shown = rng.sample(solved, SHOTS)
            row["shots"] = "".join(f"{one['input']}\n{one['target']}\n" for one in shown)
    folder.mkdir(parents=True, exist_ok=True)
    for file, kept in (("test.jsonl", rows), ("train.jsonl", solved)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def _solved(places: real.Places, name: str) -> list[dict]:
    """Training rows, or of a task that has none the test rows that would be asked last."""
    train = places.source(name) / "train.jsonl"
    if train.stat().st_size:
        return random.Random(3).sample(places.rows(name, "train"), SOLVED)
    rows = places.rows(name, "test")
    return random.Random(0).sample(rows, len(rows))[-SOLVED:]
