"""Train one expert with gates per held-in task, and one multitask LoRA; once, into a cache outside the repository.

python bench/quality/train.py --data ../shared/data --cache DIR
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
from moerge_ext.files.rows import read_rows  # noqa: E402
from moerge_ext.models.pretrained import load_model, load_tokenizer  # noqa: E402
from moerge_ext.training.encoding import collator, encode  # noqa: E402
from moerge_ext.training.experts import train_expert  # noqa: E402
from moerge_ext.training.gates import train_gates  # noqa: E402

RECIPE = {"rank": 16, "batch_size": 16, "expert_steps": 300, "gate_steps": 50, "multitask_steps": 600}
MULTITASK = "multitask"


def features(folder: Path, split: str, tokenizer) -> list[dict]:
    rows = read_rows(folder / f"{split}.jsonl")
    made = [{"input": tasks.TEMPLATE.replace("{input}", row["input"]), "target": row["target"]} for row in rows]
    return [encode(row, tokenizer, 512, seq2seq=False) for row in made]


def train(data: Path, cache: Path) -> None:
    """Every expert that the cache does not hold yet; a killed training goes on."""
    base = tasks.base(data)
    model, tokenizer = load_model(str(base), dtype="float32", device="cpu"), load_tokenizer(str(base))
    cache.mkdir(parents=True, exist_ok=True)
    recipe = cache / "recipe.json"
    if recipe.is_file() and json.loads(recipe.read_text()) != RECIPE:
        raise ValueError(f"{cache} holds experts of another recipe: choose another --cache")
    recipe.write_text(json.dumps(RECIPE))
    options = {"collate_fn": collator(tokenizer), "batch_size": RECIPE["batch_size"], "resume": True}
    everything = []
    for name in tasks.HELD_IN:
        examples = features(data / "tasks" / "train" / name, "train", tokenizer)
        everything += examples
        folder = cache / name
        if not (folder / "adapter_config.json").is_file():
            steps = {"steps": RECIPE["expert_steps"], "rank": RECIPE["rank"]}
            train_expert(model, examples, folder, **steps, **options)
        if not (folder / "moerge_gates.safetensors").is_file():
            train_gates(model, folder, examples, steps=RECIPE["gate_steps"], **options)
    if not (cache / MULTITASK / "adapter_config.json").is_file():
        random.Random(0).shuffle(everything)
        steps = {"steps": RECIPE["multitask_steps"], "rank": RECIPE["rank"]}
        train_expert(model, everything, cache / MULTITASK, **steps, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with base_lm/ and tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="where the experts go")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.data, args.cache)


if __name__ == "__main__":
    main()
