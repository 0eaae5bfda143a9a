"""The quality table: all methods on held-in and held-out tasks, with the experts that train.py made.

python bench/quality/run.py --data ../shared/data --cache DIR --embedder MODEL [--limit 50]

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
from bench.quality.train import MULTITASK, RECIPE, features  # noqa: E402
from moerge_ext import Embedder, average_activation, describe, index_examples  # noqa: E402
from moerge_ext.commands import main as cli  # noqa: E402
from moerge_ext.evaluation.evaluate import Score  # noqa: E402
from moerge_ext.evaluation.report import CHANCE, mean, mean_chance, share  # noqa: E402
from moerge_ext.experts.gates import read_gates  # noqa: E402
from moerge_ext.experts.kinds import AVERAGE_ACTIVATION  # noqa: E402
from moerge_ext.files.rows import read_rows  # noqa: E402
from moerge_ext.models.pretrained import load_model, load_tokenizer  # noqa: E402
from moerge_ext.queries.hidden import base_name  # noqa: E402
from moerge_ext.queries.index import index_file  # noqa: E402
from moerge_ext.training.encoding import collator  # noqa: E402

METHODS = (
    "base,merged,merged_factors,arrow,arrow_phatgoose,average_activation,phatgoose,glider,glider_code,glider_code/alpha=100,retrieval,"
    "retrieval_task,knn,centroid,dam,token_level,adapter_soup,adapter_soup/neighbours=mixture,lorahub,oracle_dataset,"
    "best_individual"
)
NAMES = {"arrow": "arrow, k = 4"}
RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
EMBEDDER = "all-MiniLM-L6-v2"
ACTIVATIONS = 300  # examples per expert whose mean input is taken


def prepare(data: Path, cache: Path, model: str) -> None:
    """Describe every expert by its task's instruction (meta.json), index 1000 of its examples by both embedders, and
    take the mean inputs of its layers.
    """
    base = tasks.base(data)
    language, tokenizer = load_model(str(base), dtype="float32", device="cpu"), load_tokenizer(str(base))
    text = Embedder.from_sentence_transformers(model, name=EMBEDDER)
    hidden = Embedder.from_hidden_states(language, tokenizer, name=base_name(str(base)))
    for name in tasks.HELD_IN:
        folder = data / "tasks" / "train" / name
        rows = read_rows(folder / "train.jsonl")
        if not (cache / name / index_file(text.name)).is_file():
            instruction = json.loads((folder / "meta.json").read_text())["instruction"]
            describe(cache / name, [], text, instruction=instruction)
        for embedder in (text, hidden):
            if not (cache / name / index_file(embedder.name)).is_file():
                index_examples(cache / name, rows, embedder)
        if AVERAGE_ACTIVATION not in read_gates(cache / name):
            examples = features(folder, "train", tokenizer)[:ACTIVATIONS]
            average_activation(language, cache / name, examples, collate_fn=collator(tokenizer), batch_size=32)


def evaluate(args: argparse.Namespace) -> list[dict]:
    output = args.cache / f"eval-{args.limit}"
    words = ["eval", "--model", tasks.base(args.data), "--experts", *(args.cache / name for name in tasks.HELD_IN)]
    words += ["--tasks", *tasks.folders(args.data), "--template", tasks.TEMPLATE, "--methods", args.methods]
    words += ["--embedder", args.embedder, "--embedder-name", EMBEDDER, "--multitask", args.cache / MULTITASK]
    words += ["--calibrate", *(args.data / "tasks" / "train" / name for name in tasks.HELD_IN)]
    words += ["--limit", args.limit, "--batch-size", 50, "--output", output]
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)
    return json.loads((output / "results.json").read_text())


def table(rows: list[dict]) -> str:
    """Markdown: the mean of the held-in and of the held-out tasks, % right, with 95 % intervals."""
    parts = {"train": "held-in", "heldout": "held-out"}
    names = {part: list(dict.fromkeys(r["task"] for r in rows if r["part"] == part)) for part in parts}
    lines = ["| method | " + " | ".join(f"{parts[p]}: {len(names[p])} tasks" for p in parts) + " |"]
    lines.append("| --- | ---: | ---: |")
    chances = [mean_chance([r["chance"] for r in rows if r["part"] == part]) for part in parts]
    if any(chance is not None for chance in chances):
        lines.append(f"| {CHANCE} | " + " | ".join("-" if c is None else f"{100 * c:.1f}" for c in chances) + " |")
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for part in parts:
            mine = [row for row in rows if row["method"] == method and row["part"] == part]
            cells.append(share(*mean([as_score(row) for row in mine])))
        lines.append(f"| {NAMES.get(method, method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\nNot asked: {', '.join(missing(rows)) or 'none'}."


def missing(rows: list[dict]) -> list[str]:
    """Of METHODS, what has no results; labels of GLIDER's rows also say how the query was put."""
    asked = {row["method"].partition(" ")[0] for row in rows}
    return [f"`{name}`" for name in METHODS.split(",") if name not in asked]


def as_score(row: dict) -> Score:
    right = round(row["score"] * row["n"])
    return Score(row["method"], row["task"], row["part"], row["metric"], row["n"], right, row["chance"], ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with base_lm/ and tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="experts of train.py, and the answers")
    parser.add_argument("--embedder", required=True, help=f"{EMBEDDER}: hub id or folder")
    parser.add_argument("--limit", type=int, default=50, help="items per task (default: %(default)s)")
    parser.add_argument("--methods", default=METHODS, help="(default: all)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare(args.data, args.cache, args.embedder)
    rows = evaluate(args)
    RESULTS.write_text("".join(json.dumps({**row, "recipe": RECIPE, "limit": args.limit}) + "\n" for row in rows))
    tasks.fill("table", table(rows))


if __name__ == "__main__":
    main()
