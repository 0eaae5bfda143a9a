"""Every row on every task, with the experts of real_train.py; answers are kept, a run that was stopped goes on.

python bench/quality/real_eval.py --data ../shared/data --cache DIR --embedder MODEL

Writes bench/results/quality_real_<experts>.jsonl.gz, from which real_table.py makes the tables.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import real, real_answers  # noqa: E402
from bench.quality.real_answers import Asked  # noqa: E402
from bench.quality.real_batches import collate  # noqa: E402
from moerge_ext import Embedder, average_activation, describe, index_examples, load_experts  # noqa: E402
from moerge_ext.evaluation.evaluate import Settings, evaluate  # noqa: E402
from moerge_ext.evaluation.runs import Run, parse_run  # noqa: E402
from moerge_ext.evaluation.tasks import Task, load_task  # noqa: E402
from moerge_ext.experts.bank import ExpertBank  # noqa: E402
from moerge_ext.experts.gates import gates_file, read_gates  # noqa: E402
from moerge_ext.experts.kinds import AVERAGE_ACTIVATION, SIGMOID_GATE  # noqa: E402
from moerge_ext.experts.routers import ROUTERS_FILE, read_routers  # noqa: E402
from moerge_ext.methods.fixed import PREFIX  # noqa: E402
from moerge_ext.queries.calibration import calibrate_threshold  # noqa: E402
from moerge_ext.queries.example_router import ExampleRouter  # noqa: E402
from moerge_ext.queries.index import index_file  # noqa: E402
from moerge_ext.queries.router import QueryRouter  # noqa: E402
from moerge_ext.training.encoding import Encoder  # noqa: E402

FIRST = ("base", "phatgoose", "retrieval", "merged", "arrow_phatgoose", "average_activation")
SECOND = ("phatgoose/top_k=1", "phatgoose/top_k=3", "arrow", "merged_factors", "glider")
THIRD = ("knn", "centroid", "retrieval_task", "adapter_soup", "weight_sentsim", "arrow_peft", "average_activation_mttl")
OWN_INSTRUCTIONS = ("glider",)  # with the instruction of the query's task
ACTIVATIONS, INDEXED, CALIBRATION = 32, 200, 20  # examples per expert


class OwnInstructions:
    """In place of a writer: what a query's task asks for, as its meta.json says it."""

    name = "the tasks' own instructions"
    similar = None
    templates = ()

    def __init__(self, tasks: Sequence[Task]):
        self.known = {row["input"]: row["instruction"] for task in tasks for row in task.rows}

    def query(self, text: str, similar: Sequence[dict] = ()) -> str:
        return self.known[text]

    def task(self, examples: Sequence[dict]) -> str:
        return self.known[examples[0]["input"]]


def prepare(places: real.Places, names: Sequence[str], embedder: Embedder, model: nn.Module, tokenizer: Any) -> None:
    """Describe every expert by its task's instruction, index its examples, take the mean inputs of its layers."""
    for name in names:
        folder, rows = places.expert(name), places.rows(name, "train")
        if not (folder / index_file(embedder.name)).is_file():
            describe(folder, [], embedder, instruction=places.instruction(name))
            index_examples(folder, random.Random(0).sample(rows, min(INDEXED, len(rows))), embedder)
        if AVERAGE_ACTIVATION not in read_gates(folder):
            rows = random.Random(1).sample(rows, ACTIVATIONS)
            made = Encoder(model, tokenizer, prompt=real.FORM).features(rows)
            batches = [collate(made[i : i + 16], tokenizer.pad_token_id) for i in range(0, len(made), 16)]
            average_activation(model, folder, batches)


def write_task(places: real.Places, name: str, chunk: int, size: int) -> Path | None:
    """The folder of the task as it is asked: a chunk of its rows in random order, choices where there are few.

    None when earlier chunks hold all of its rows.
    """
    folder = places.cache / f"tasks-{size}" / f"{chunk}" / name
    meta = json.loads((places.source(name) / "meta.json").read_text(encoding="utf-8"))
    rows = places.rows(name, "test")
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def calibrated(router: QueryRouter, places: real.Places, names: Sequence[str]) -> QueryRouter:
    held_in = {}
    for name in names:
        rows = random.Random(0).sample(places.rows(name, "validation"), CALIBRATION)
        if isinstance(router.writer, OwnInstructions):
            router.writer.known |= {row["input"]: row["instruction"] for row in rows}
        held_in[name] = [row["input"] for row in rows]
    calibrate_threshold(router, held_in)
    return router


def run(args: argparse.Namespace) -> None:
    """Chunk after chunk of every task's items, in every chunk all rows."""
    places = real.Places(args.data, args.cache)
    names = real.HELD_IN[: args.experts]
    embedder = Embedder.from_sentence_transformers(args.embedder, name=real.EMBEDDER)
    model, tokenizer = real.load_base(places)
    prepare(places, names, embedder, model, tokenizer)
    experts = load_experts([places.expert(name) for name in names])
    notes = {name: json.loads((places.expert(name) / "facts.json").read_text()) for name in names}
    facts = {"recipe": asdict(real.Recipe()), "template": real.TEMPLATE, "experts": notes}
    settings = Settings(template=real.TEMPLATE, batch_size=args.items)
    file = real_answers.file_of(len(names))
    done: list[list[Asked]] = []
    for chunk in range(args.chunks):
        folders = [write_task(places, name, chunk, args.items) for name in (*names, *real.HELD_OUT[: args.heldout])]
        tasks = [load_task(folder) for folder in folders if folder is not None]
        output = args.cache / f"eval-{len(names)}-{args.items}" / f"{chunk}"
        asked: list[Asked] = []
        for part in parts(experts, embedder, tasks, places):
            folder = output.with_name(f"{chunk}{part.suffix.replace('/', '-').replace('=', '-')}")
            scores = evaluate(
                model, tokenizer, part.pool, part.runs, tasks, settings, routers=part.routers, output=folder
            )
            asked.append(Asked(folder, tasks, scores, part.suffix))
            if not done:  # of the first chunk also what there is so far: later chunks join when they are whole
                real_answers.pack([asked], facts, file)
        done.append(asked)
        real_answers.pack(done, facts, file)


def other_gates(places: real.Places, names: Sequence[str]) -> dict[int, ExpertBank]:
    """{steps of gate training: the experts with these gates}, where all of them have some."""
    found = {}
    for folder in places.cache.glob(real.OTHER_GATES.format("*")):
        if all(gates_file(folder / name, SIGMOID_GATE).is_file() for name in names):
            found[int(folder.name.rpartition("-")[2])] = load_experts([folder / name for name in names])
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Part:
    """Rows that are asked together; suffix: what their names get behind them in the table."""

    runs: Sequence[Run]
    pool: ExpertBank
    routers: dict[str, Any]
    suffix: str = ""


def parts(experts: ExpertBank, embedder: Embedder, tasks: Sequence[Task], places: real.Places) -> list[Part]:
    """What matters most first."""
    names = experts.names
    routers = {
        "instruction": calibrated(QueryRouter(experts, embedder), places, names),
        "examples": ExampleRouter(experts, embedder),
    }
    own = {"instruction": calibrated(QueryRouter(experts, embedder, OwnInstructions(tasks)), places, names)}
    first, second, third = ([parse_run(text) for text in texts] for texts in (FIRST, SECOND, THIRD))
    alone = [parse_run(PREFIX + name) for name in names]
    trained = [
        replace(parse_run(file.parent.name), options={"routers": read_routers(file)})
        for file in sorted(places.routers("").glob(f"*/{ROUTERS_FILE}"))
    ]
    return [
        Part(first, experts, routers),
        Part([parse_run(text) for text in OWN_INSTRUCTIONS], experts, own),
        Part(alone, experts, routers),
        Part(second, experts, routers),
        *([Part(trained, experts, {})] if trained else []),
        *(
            Part([parse_run("phatgoose")], pool, {}, f"/gates={steps}")
            for steps, pool in other_gates(places, names).items()
        ),
        Part(third, experts, routers),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="of real_train.py; the answers go there too")
    parser.add_argument("--embedder", required=True, help=f"{real.EMBEDDER}: hub id or folder")
    parser.add_argument("--experts", type=int, default=len(real.HELD_IN), help="the first N tasks (default: all)")
    parser.add_argument("--heldout", type=int, default=len(real.HELD_OUT), help="the first N of them (default: all)")
    parser.add_argument("--items", type=int, default=24, help="of every task in a chunk (default: %(default)s)")
    parser.add_argument("--chunks", type=int, default=8, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run(args)


if __name__ == "__main__":
    main()
