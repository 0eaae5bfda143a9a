"""Every row on every task, with the experts of real_train.py; answers are kept, a run that was stopped goes on.

python bench/quality/real_eval.py --data ../shared/data --cache DIR --embedder MODEL
python bench/quality/real_eval.py ... --experts 4 --scaling     # another pool: few rows, held-out tasks
python bench/quality/real_eval.py ... --claims           # eight times the held-out items, of the rows of claims
python bench/quality/real_eval.py ... --others           # the same rows on the held-out tasks that are not in the table
python bench/quality/real_eval.py ... --varied           # pools made in other ways, on held-out tasks
python bench/quality/real_eval.py ... --results bench/results --rows dam multitask   # join the rows that are there
python bench/quality/real_eval.py ... --results bench/results --rows ablated why --nearness

Writes quality_real_<experts>.jsonl.gz (--claims: quality_heldout_..., --others: quality_others_..., --varied:
quality_varied_...) into the cache's results/, or where --results says; real_table.py makes the tables of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.machine import environment  # noqa: E402
from bench.quality import (  # noqa: E402
    real,
    real_answers,
    real_join,
    real_nearness,
    real_routers,
    real_rows,
    real_tasks,
    real_weights,
)
from bench.quality.real_answers import Asked  # noqa: E402
from bench.quality.real_rows import Part  # noqa: E402
from moerge_ext.evaluation.evaluate import Settings, evaluate  # noqa: E402
from moerge_ext.evaluation.tasks import Task, load_task  # noqa: E402

FILES = {  # {which rows of which tasks: the results' file}
    "claims": real_answers.HELD_OUT_FILES,
    "others": real_answers.OTHER_FILES,
    "varied": real_answers.VARIED_FILES,
}
CHUNKS = {"claims": 8, "others": 6, "varied": 2}
GROUPS = {"ablated": real_rows.ABLATED, "why": real_rows.WHY}


def tasks_of(places: real.Places, args: argparse.Namespace, chunk: int, *, shots: bool = False) -> list[Task]:
    """A chunk of all the tasks that are asked."""
    held_in = () if args.scaling or args.only else real.HELD_IN[: args.experts]
    apart = {"others": real.OTHERS, "varied": real.VARIED}
    names = apart.get(args.only, (*held_in, *real.HELD_OUT[: args.heldout]))
    folders = [real_tasks.write_task(places, name, chunk, args.items, shots=shots) for name in names]
    return [load_task(folder) for folder in folders if folder is not None]


def made() -> dict[str, Any]:
    """Where, by what and of how many examples; the seed is the default of all that is trained."""
    return {
        **environment(torch.device("cpu")),
        "seed": 0,
        "embedder": real.EMBEDDER,
        "activations": real_routers.ACTIVATIONS,
        "indexed": real_routers.INDEXED,
        "calibrated": real_routers.CALIBRATION,
    }


class Asking:
    """Asks rows of one pool; `facts` is what the results say of how it was made."""

    def __init__(self, args: argparse.Namespace):
        names = real.POOL[: args.experts]
        self.args, self.places = args, real.Places(args.data, args.cache)
        pattern = FILES.get(args.only, real_answers.FILES)
        self.file = real_answers.file_of(args.results, len(names), pattern)
        if args.rows and not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: expected the results that --rows are to join; --results says where")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.folder = args.cache / f"{args.only or 'eval'}-{len(names)}-{args.items}"
        self.model, self.tokenizer = real.load_base(self.places)
        self.deciders = real_routers.Deciders(self.places, names, args.embedder, self.model, self.tokenizer)
        notes = {name: json.loads((self.places.expert(name) / "facts.json").read_text()) for name in names}
        self.facts = {"recipe": asdict(real.Recipe()), "template": real.TEMPLATE, "experts": notes} | {
            "pooled": real_routers.POOLED,
            "sparse": real_routers.SPARSE,
            "dense": real_routers.DENSE,
            "judged": real_routers.JUDGED,
            "shots": real_tasks.SHOTS,
            "made": made(),
        }

    def tasks(self, chunk: int, *, shots: bool = False) -> list[Task]:
        return tasks_of(self.places, self.args, chunk, shots=shots)

    def parts(self, tasks: Sequence[Task]) -> Iterator[Part]:
        """What is to be asked of these."""
        pool, deciders = self.deciders.pool, self.deciders
        if self.args.scaling:
            return real_rows.compared(pool, deciders)
        if self.args.only:
            return (real_rows.varied if self.args.only == "varied" else real_rows.claimed)(pool, tasks, deciders)
        return real_rows.parts(pool, tasks, deciders)

    def ask(self, part: Part, chunk: int) -> Asked:
        """The answers of a part's rows to a chunk, those that are there taken as they are."""
        folder = self.folder / f"{chunk}{part.suffix.replace('/', '-').replace('=', '-')}"
        settings = Settings(template=part.template, batch_size=self.args.items)
        tasks = self.tasks(chunk, shots=part.template != real.TEMPLATE)
        scores = evaluate(
            self.model, self.tokenizer, part.pool, part.runs, tasks, settings, routers=part.routers,
            answerers=part.answerers, output=folder,
        )  # fmt: skip
        return Asked(folder, self.tasks(chunk), scores, part.suffix)

    def everything(self) -> None:
        """Chunk after chunk of every task's items, in every chunk all rows."""
        args, pool, done = self.args, self.deciders.pool, []
        if not args.scaling and not args.only:
            self.facts["weights"] = real_weights.measure(self.model, self.tokenizer, pool, self.tasks(0))
            self.facts["weights_told"] = self.weights_told()
        for chunk in range(args.chunks):
            asked: list[Asked] = []
            for part in self.parts(self.tasks(chunk)):
                asked.append(self.ask(part, chunk))
                if not done:  # of the first chunk also what there is so far: later chunks join when they are whole
                    self.pack([asked])
            done.append(asked)
            self.pack(done)
        if not args.scaling and not args.only:
            self.facts["nearness"] = self.nearness()
            self.pack(done)

    def pack(self, chunks: Sequence[Sequence[Asked]]) -> None:
        real_answers.pack(chunks, self.facts | self.deciders.more_facts(), self.file)

    def more(self) -> None:
        """The rows that were named, each joining the results there are as soon as it is whole."""
        asked: list[list[Asked]] = [[] for _ in range(self.args.chunks)]
        named = [row for name in self.args.rows for row in GROUPS.get(name, (name,))]
        self.facts |= {"nearness": self.nearness()} if self.args.nearness else {}
        self.facts |= {"weights_told": self.weights_told()} if self.args.shares else {}
        for name in dict.fromkeys((*real_join.CHECKED, *named)):
            for chunk, parts in enumerate(asked):
                part = real_rows.part_of(name, self.deciders.pool, self.deciders, self.tasks(chunk))
                parts.append(self.ask(part, chunk))
            if len(asked[0]) >= len(real_join.CHECKED):
                new = real_answers.collected(asked, self.facts | self.deciders.more_facts())
                real_answers.write(real_join.joined(real_answers.read(self.file), new), self.file)

    def weights_told(self) -> dict[str, dict[str, float]]:
        """Where GLIDER's weight goes that is told the task."""
        tasks = self.tasks(0)
        router = self.deciders.told(tasks)["instruction"]
        return real_weights.measure(self.model, self.tokenizer, self.deciders.pool, tasks, router)

    def nearness(self) -> dict[str, dict]:
        """How near routing comes to the best expert, as the answers that are there say which that is."""
        tasks = [task for task in self.tasks(0) if task.part == "heldout"]
        best = real_nearness.best_experts(real_answers.read(self.file), [task.name for task in tasks])
        return real_nearness.measure(self.model, self.tokenizer, self.deciders, tasks, best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks/")
    parser.add_argument("--cache", type=Path, required=True, help="of real_train.py; the answers go there too")
    parser.add_argument("--embedder", required=True, help=f"{real.EMBEDDER}: hub id or folder")
    parser.add_argument("--experts", type=int, default=len(real.HELD_IN), help="the first N of POOL (%(default)s)")
    parser.add_argument("--heldout", type=int, default=len(real.HELD_OUT), help="the first N of them (default: all)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--scaling", action="store_true", help="only what compares pools of several sizes")
    for name, said in (
        ("claims", "only held-out tasks, and rows that claims are of"),
        ("others", "these rows of the held-out tasks that are not in the table"),
        ("varied", "the pool made in other ways, on held-out tasks"),
    ):
        only.add_argument(f"--{name}", dest="only", action="store_const", const=name, help=said)
    only.add_argument(
        "--rows",
        nargs="+",
        help=f"only these, or those of {', '.join(GROUPS)}, into the results there are (real_join.py)",
    )
    parser.add_argument("--nearness", action="store_true", help="with --rows: also how near PHATGOOSE is to the oracle")
    parser.add_argument("--shares", action="store_true", help="with --rows: also where the weight of GLIDER goes")
    parser.add_argument("--items", type=int, default=24, help="of every task in a chunk (default: %(default)s)")
    parser.add_argument("--chunks", type=int, help="(default: 1, with --claims 8, --others 6, --varied 2)")
    parser.add_argument("--results", type=Path, help="folder of the results (default: results/ in the cache)")
    args = parser.parse_args()
    args.chunks = args.chunks or CHUNKS.get(args.only, 1)
    args.results = args.results or args.cache / "results"
    torch.set_num_threads(1)
    asking = Asking(args)
    if args.rows:
        asking.more()
    else:
        asking.everything()


if __name__ == "__main__":
    main()
