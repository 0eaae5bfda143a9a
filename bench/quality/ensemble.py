"""PELMo on real questions: four LoRA experts, a router trained on a few hundred questions, 600 others to answer.

python bench/quality/ensemble.py --data ../shared/data --cache DIR --router MODEL

Writes the questions and prompts, then runs `moerge train-router` and `moerge ensemble` in the cache; the table and the
paired interval are copied to bench/results/quality_ensemble.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import tasks  # noqa: E402
from moerge_ext.commands import main as cli  # noqa: E402
from moerge_ext.files.rows import read_rows  # noqa: E402

DOMAINS = ("clinc_banking", "clinc_home", "clinc_kitchen_and_dining", "clinc_travel")
TRAIN, TEST = 400, 600  # questions, evenly from the domains
RESULT = ROOT / "bench" / "results" / "quality_ensemble.json"


def write_questions(data: Path, folder: Path) -> None:
    """train.jsonl from the validation rows (which no expert was trained on), test.jsonl from the test rows."""
    for split, file, total in (("validation", "train.jsonl", TRAIN), ("test", "test.jsonl", TEST)):
        rows = []
        for name in DOMAINS:
            found = read_rows(data / "tasks" / "train" / name / f"{split}.jsonl")[: total // len(DOMAINS)]
            rows += [{**row, "domain": name} for row in found]
        random.Random(0).shuffle(rows)
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_prompts(cache: Path, folder: Path) -> None:
    entries = [{"name": name, "lora": str(cache / name), "template": {"question": tasks.TEMPLATE}} for name in DOMAINS]
    (folder / "prompts.json").write_text(json.dumps(entries))


def run(*words: object) -> None:
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)


def table(result: dict) -> str:
    """Markdown: every row with its 95 % interval, and the paired difference."""
    lines = ["| row | % right | 95 % |", "| --- | ---: | ---: |"]
    for row in result["rows"]:
        low, high = 100 * row["low"], 100 * row["high"]
        lines.append(f"| {row['method']} | {100 * row['score']:.1f} | {low:.1f} to {high:.1f} |")
    pair = result["paired"]
    mean, low, high = (100 * pair[key] for key in ("mean", "low", "high"))
    return "\n".join(lines) + (
        f"\n\n{pair['n']} questions; {pair['ensemble']} minus {pair['expert']}, the best of each on them: {mean:+.1f} "
        f"points, paired 95 % interval {low:+.1f} to {high:+.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with base_lm/ and tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="experts of train.py, and this run")
    parser.add_argument("--router", required=True, help="encoder to fine-tune: hub id or folder")
    parser.add_argument("--theta", default="0.7", help="for all-MiniLM-L6-v2")
    parser.add_argument("--epochs", default="2")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.cache / "ensemble"
    folder.mkdir(parents=True, exist_ok=True)
    write_questions(args.data, folder)
    write_prompts(args.cache.resolve(), folder)
    shared = ["--model", tasks.base(args.data), "--prompts", folder / "prompts.json", "--max-new-tokens", 16]
    shared += ["--embedder", args.router, "--embedder-name", "all-MiniLM-L6-v2"]
    train = ["train-router", *shared, "--data", folder / "train.jsonl", "--router", args.router, "--lr", "1e-4"]
    train += ["--epochs", args.epochs, "--theta", args.theta, "--max-length", 64]
    run(*train, "--output", folder / "multi")
    run(*train[:-4], "--max-length", 64, "--single-label", "--output", folder / "single")
    routers = ["--router", folder / "multi", "--single-label-router", folder / "single"]
    run("ensemble", *shared, "--data", folder / "test.jsonl", *routers, "--batch-size", 64, "--output", folder / "out")
    rows = json.loads((folder / "out" / "results.json").read_text())
    paired = json.loads((folder / "out" / "paired.json").read_text())
    result = {"domains": DOMAINS, "train": TRAIN, "epochs": int(args.epochs), "rows": rows, "paired": paired}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    tasks.fill("ensemble", table(result))


if __name__ == "__main__":
    main()
