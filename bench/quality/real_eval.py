"""Every row on every task, with the experts of real_train.py; answers are kept, a run that was stopped goes on.

python bench/quality/real_eval.py --data ../shared/data --cache DIR --embedder MODEL
python bench/quality/real_eval.py ... --experts 4 --scaling      # a smaller pool: fewer rows, held-out tasks alone

Writes bench/results/quality_real_<experts>.jsonl.gz, from which real_table.py makes the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import real, real_answers, real_routers, real_rows, real_tasks, real_weights  # noqa: E402
from bench.quality.real_answers import Asked  # noqa: E402
from moerge_ext.evaluation.evaluate import Settings, evaluate  # noqa: E402
from moerge_ext.evaluation.tasks import Task, load_task  # noqa: E402


def tasks_of(places: real.Places, args: argparse.Namespace, chunk: int, *, shots: bool = False) -> list[Task]:
    """A chunk of all the tasks that are asked."""
    held_in = () if args.scaling else real.HELD_IN[: args.experts]
    names = (*held_in, *real.HELD_OUT[: args.heldout])
    folders = [real_tasks.write_task(places, name, chunk, args.items, shots=shots) for name in names]
    return [load_task(folder) for folder in folders if folder is not None]


def run(args: argparse.Namespace) -> None:
    """Chunk after chunk of every task's items, in every chunk all rows."""
    places = real.Places(args.data, args.cache)
    names = real.HELD_IN[: args.experts]
    model, tokenizer = real.load_base(places)
    deciders = real_routers.Deciders(places, names, args.embedder, model, tokenizer)
    notes = {name: json.loads((places.expert(name) / "facts.json").read_text()) for name in names}
    facts = {"recipe": asdict(real.Recipe()), "template": real.TEMPLATE, "experts": notes}
    facts |= {
        "pooled": real_routers.POOLED,
        "sparse": real_routers.SPARSE,
        "dense": real_routers.DENSE,
        "judged": real_routers.JUDGED,
        "shots": real_tasks.SHOTS,
    }
    settings = Settings(template=real.TEMPLATE, batch_size=args.items)
    file = real_answers.file_of(len(names))
    if not args.scaling:
        facts["weights"] = real_weights.measure(model, tokenizer, deciders.pool, tasks_of(places, args, 0))
    done: list[list[Asked]] = []
    for chunk in range(args.chunks):
        tasks = tasks_of(places, args, chunk)
        output = args.cache / f"eval-{len(names)}-{args.items}" / f"{chunk}"
        asked: list[Asked] = []
        for part in real_rows.parts(deciders.pool, tasks, deciders, args.scaling):
            folder = output.with_name(f"{chunk}{part.suffix.replace('/', '-').replace('=', '-')}")
            shots = part.template != real.TEMPLATE
            scores = evaluate(
                model, tokenizer, part.pool, part.runs, tasks_of(places, args, chunk, shots=True) if shots else tasks,
                replace(settings, template=part.template), routers=part.routers, answerers=part.answerers,
                output=folder,
            )  # fmt: skip
            asked.append(Asked(folder, tasks, scores, part.suffix))
            if not done:  # of the first chunk also what there is so far: later chunks join when they are whole
                real_answers.pack([asked], facts, file)
        done.append(asked)
        real_answers.pack(done, facts, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="of real_train.py; the answers go there too")
    parser.add_argument("--embedder", required=True, help=f"{real.EMBEDDER}: hub id or folder")
    parser.add_argument("--experts", type=int, default=len(real.HELD_IN), help="the first N tasks (default: all)")
    parser.add_argument("--heldout", type=int, default=len(real.HELD_OUT), help="the first N of them (default: all)")
    parser.add_argument("--scaling", action="store_true", help="only what compares pools of several sizes")
    parser.add_argument("--items", type=int, default=24, help="of every task in a chunk (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(args)


if __name__ == "__main__":
    main()
