"""Train one expert with gates for every held-in task of SmolLM2-135M-Instruct; a run that was stopped goes on.

python bench/quality/real_train.py --data ../shared/data --cache DIR
python bench/quality/real_train.py ... --multitask       # instead: one LoRA of all the tasks, by as many steps
python bench/quality/real_train.py ... --gate-steps 30 30x16   # also gates of so many steps, or of batches of 16
python bench/quality/real_train.py ... --rate 0.001      # instead: the experts at this rate, with alpha = rank
python bench/quality/real_train.py ... --recipe          # instead: what recipes do on the tasks that are set aside
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import real  # noqa: E402
from bench.quality.real_batches import batches  # noqa: E402
from moerge_ext.training.encoding import Encoder  # noqa: E402
from moerge_ext.training.experts import train_expert  # noqa: E402
from moerge_ext.training.gates import train_gates  # noqa: E402

CANDIDATES = ((1.0, 5e-3), (16.0, 1e-3), (16.0, 3e-3))  # alpha, lr; the first is PHATGOOSE's
RECIPE_STEPS = 30
LAST = 8  # steps, whose mean loss says how good a recipe is: no row has been seen before in them


def train_batches(places: real.Places, name: str, model: nn.Module, tokenizer: Any, batch_size: int) -> list[dict]:
    features = Encoder(model, tokenizer, prompt=real.FORM).features(places.rows(name, "train"))
    return batches(features, batch_size, tokenizer.pad_token_id)


def expert(places: real.Places, name: str, model: nn.Module, tokenizer: Any, recipe: real.Recipe, folder: Path) -> dict:
    """Train one, unless it is there; returns what it took."""
    data = train_batches(places, name, model, tokenizer, recipe.batch_size)
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        result = train_expert(
            model, data, folder, rank=recipe.rank, alpha=recipe.alpha, lr=recipe.lr, steps=recipe.steps,
            checkpoint_every=20, resume=True,
        )  # fmt: skip
    return {"cpu_s": time.process_time() - start, "losses": result.losses, "already": result.already}


def gates(places: real.Places, name: str, model: nn.Module, tokenizer: Any, recipe: real.Recipe, folder: Path) -> dict:
    data = train_batches(places, name, model, tokenizer, recipe.gate_batch_size)
    start = time.process_time()
    result = train_gates(
        model, folder, data, lr=recipe.gate_lr, steps=recipe.gate_steps, checkpoint_every=20, resume=True
    )
    return {"cpu_s": time.process_time() - start, "losses": result.losses, "already": result.already}


def other_gates(places: real.Places, names: Sequence[str], model: nn.Module, tokenizer: Any, said: str) -> None:
    """The same experts, in folders of their own, with gates of other steps; said: as in --gate-steps."""
    steps, _, rows = said.partition("x")
    recipe = replace(real.Recipe(), gate_steps=int(steps))
    recipe = replace(recipe, gate_batch_size=int(rows)) if rows else recipe
    for name in names:
        folder = places.cache / real.OTHER_GATES.format(said) / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            shutil.copy2(places.expert(name) / file, folder / file)
        gates(places, name, model, tokenizer, recipe, folder)


def multitask(places: real.Places, names: Sequence[str], model: nn.Module, tokenizer: Any) -> None:
    """One LoRA by as many steps as all experts together, on as many random rows of every task as its expert saw."""
    recipe, features = real.Recipe(), []
    for name in names:
        rows = places.rows(name, "train")
        seen = random.Random(3).sample(rows, min(len(rows), recipe.steps * recipe.batch_size))
        features += Encoder(model, tokenizer, prompt=real.FORM).features(seen)
    data = batches(features, recipe.batch_size, tokenizer.pad_token_id)
    steps, folder, start = recipe.steps * len(names), places.multitask(), time.process_time()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        result = train_expert(
            model, data, folder, rank=recipe.rank, alpha=recipe.alpha, lr=recipe.lr, steps=steps,
            checkpoint_every=20, resume=True,
        )  # fmt: skip
    if not result.already:
        facts = {"rows": len(features), "steps": steps, "cpu_s": time.process_time() - start}
        (folder / "facts.json").write_text(json.dumps(facts | {"losses": result.losses}))


def try_recipes(places: real.Places, model: nn.Module, tokenizer: Any) -> None:
    """Mean loss of the last steps on every task that is set aside, for every candidate."""
    file = places.cache / "recipes.json"
    found = json.loads(file.read_text()) if file.is_file() else []
    for name in real.SET_ASIDE:
        for alpha, lr in CANDIDATES:
            if any((row["task"], row["alpha"], row["lr"]) == (name, alpha, lr) for row in found):
                continue
            recipe = replace(real.Recipe(), alpha=alpha, lr=lr, steps=RECIPE_STEPS)
            facts = expert(
                places, name, model, tokenizer, recipe, places.cache / "recipes" / f"{name}-{alpha:g}-{lr:g}"
            )
            loss = fmean(facts["losses"][-LAST:])
            found.append({"task": name, "alpha": alpha, "lr": lr, "loss": loss, **facts})
            file.write_text(json.dumps(found))
            print(f"{name}: alpha {alpha:g}, lr {lr:g}: loss {loss:.3f} after {facts['cpu_s']:.0f} s", flush=True)


def note(places: real.Places, name: str, key: str, facts: dict) -> None:
    """Keep what a training took beside the expert; a resumed run that had nothing to do changes nothing."""
    file = places.expert(name) / "facts.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if not facts.pop("already") or key not in known:
        file.write_text(json.dumps(known | {key: facts}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="where base, experts and answers go")
    parser.add_argument("--experts", type=int, default=len(real.HELD_IN), help="the first N of POOL (%(default)s)")
    parser.add_argument("--multitask", action="store_true", help="train one LoRA on all of these tasks")
    parser.add_argument("--recipe", action="store_true", help="compare recipes on the tasks that are set aside")
    parser.add_argument("--rate", type=float, help="instead: experts at this rate, with alpha = rank")
    parser.add_argument("--gate-steps", nargs="*", default=[], help="further gates, of so many steps: 30, or 30x16")
    args = parser.parse_args()
    torch.set_num_threads(1)
    places = real.Places(args.data, args.cache)
    model, tokenizer = real.load_base(places)
    if args.multitask:
        multitask(places, real.POOL[: args.experts], model, tokenizer)
        return
    if args.recipe:
        try_recipes(places, model, tokenizer)
        return
    recipe, known = real.Recipe(), places.cache / "recipe.json"
    if args.rate is not None:
        recipe = replace(recipe, alpha=float(recipe.rank), lr=args.rate)
        places = replace(places, experts=real.OTHER_RATE.format(args.rate))
        known = places.cache / f"{places.experts}.json"
    if known.is_file() and json.loads(known.read_text()) != asdict(recipe):
        raise ValueError(f"{args.cache} holds experts of another recipe: choose another --cache")
    known.write_text(json.dumps(asdict(recipe)))
    for name in real.POOL[: args.experts]:
        note(places, name, "expert", expert(places, name, model, tokenizer, recipe, places.expert(name)))
        note(places, name, "gates", gates(places, name, model, tokenizer, recipe, places.expert(name)))
    for steps in args.gate_steps:
        other_gates(places, real.POOL[: args.experts], model, tokenizer, steps)


if __name__ == "__main__":
    main()
