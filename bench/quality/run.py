"""The quality table: all methods on held-in and held-out tasks, with the experts that train.py made.

python bench/quality/run.py --data ../shared/data --cache DIR --embedder MODEL [--limit 100]

Answers lie in the cache; a run that was cut off goes on. Writes bench/results/quality.jsonl and, from it, the table of
bench/quality/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import tasks  # noqa: E402
from bench.quality.train import MULTITASK, RECIPE  # noqa: E402
from moerge_ext import Embedder, cli, describe, index_examples  # noqa: E402
from moerge_ext.evaluation.metrics import Z  # noqa: E402
from moerge_ext.evaluation.tasks import read_rows  # noqa: E402
from moerge_ext.query.index import INDEX_FILE  # noqa: E402

METHODS = (
    "base,merged,merged_factors,arrow,phatgoose,glider,glider_code,glider_code/alpha=100,retrieval,retrieval_task,knn,"
    "centroid,centroid_factors,adapter_soup,oracle_dataset,best_individual"
)
RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
EMBEDDER = "all-MiniLM-L6-v2"


def prepare(data: Path, cache: Path, model: str) -> None:
    """Describe every expert by its task's instruction (meta.json) and index 1000 of its examples."""
    embedder = None
    for name in tasks.HELD_IN:
        if (cache / name / INDEX_FILE).is_file():
            continue
        embedder = embedder or Embedder.from_sentence_transformers(model, name=EMBEDDER)
        folder = data / "tasks" / "train" / name
        instruction = json.loads((folder / "meta.json").read_text())["instruction"]
        describe(cache / name, [], embedder, instruction=instruction)
        index_examples(cache / name, read_rows(folder / "train.jsonl"), embedder)


def evaluate(data: Path, cache: Path, model: str, limit: int, methods: str) -> list[dict]:
    output = cache / f"eval-{limit}"
    words = ["eval", "--model", tasks.base(data), "--experts", *(cache / name for name in tasks.HELD_IN)]
    words += ["--tasks", *tasks.folders(data), "--template", tasks.TEMPLATE, "--methods", methods]
    words += ["--embedder", model, "--embedder-name", EMBEDDER, "--multitask", cache / MULTITASK]
    words += ["--calibrate", *(data / "tasks" / "train" / name for name in tasks.HELD_IN)]
    words += ["--limit", limit, "--batch-size", 50, "--output", output]
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)
    return json.loads((output / "results.json").read_text())


def table(rows: list[dict]) -> str:
    """Markdown: the mean of the held-in and of the held-out tasks, % right, with 95 % intervals."""
    parts = {"train": "held-in", "heldout": "held-out"}
    names = {part: list(dict.fromkeys(r["task"] for r in rows if r["part"] == part)) for part in parts}
    lines = ["| method | " + " | ".join(f"{parts[p]}: {len(names[p])} tasks" for p in parts) + " |"]
    lines.append("| --- | ---: | ---: |")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for part in parts:
            mine = [row for row in rows if row["method"] == method and row["part"] == part]
            mean = sum(row["score"] for row in mine) / len(mine)
            half = Z * sum(r["score"] * (1 - r["score"]) / r["n"] for r in mine) ** 0.5 / len(mine)
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with base_lm/ and tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="experts of train.py, and the answers")
    parser.add_argument("--embedder", required=True, help=f"{EMBEDDER}: hub id or folder")
    parser.add_argument("--limit", type=int, default=100, help="items per task (default: %(default)s)")
    parser.add_argument("--methods", default=METHODS, help="(default: all)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args.data, args.cache, args.embedder)
    rows = evaluate(args.data, args.cache, args.embedder, args.limit, args.methods)
    facts = {"recipe": RECIPE, "limit": args.limit}
    RESULTS.write_text("".join(json.dumps({**row, **facts}) + "\n" for row in rows))
    tasks.fill("table", table(rows))


if __name__ == "__main__":
    main()
