"""PELMo's own setting: four prompt strategies of one chat model on four kinds of questions, and a router over them.

python bench/quality/pelmo.py run --data DIR --cache CACHE --model MODEL --encoder ENCODER
python bench/quality/pelmo.py table [--data DIR]

MODEL is a chat model (a folder, a hub id or a GGUF file), ENCODER the folder of all-MiniLM-L6-v2. `run` writes
questions and prompts into the cache, trains both routers and asks everybody (`moerge train-router`, `moerge ensemble`),
and can be stopped and called again at any time; at the end bench/results/ has pelmo.json and pelmo_items.jsonl.gz.
`table` makes Tables 1 and 2 (in README.md) and Figure 5 from these two files, and with --data judges every answer anew.

| kind | task | expert |
|---|---|---|
| knowledge | clinc_banking: the intent of an utterance | ten passages: other utterances with their intents |
| multi-hop | babi_qa15_deduction | chain of thought; the two facts, found in the story by a rule |
| mathematics | gsm8k | chain of thought, written by hand |
| common sense | bbq_age, three choices | ten answers of the model, of 24 tokens at most; two with a demonstration |

What differs from the paper: the sets (and with them Wikipedia, Contriever and GPT-3.5 as judge: answers are short, and
judged by rules), the size of the backbone, the encoder, and fewer demonstrations where --shots says so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality.tasks import fill  # noqa: E402
from moerge_ext.commands import main as cli  # noqa: E402
from moerge_ext.ensemble.figure import plot_top_k  # noqa: E402
from moerge_ext.ensemble.judge import JUDGES, final_answer, number  # noqa: E402
from moerge_ext.ensemble.measure import ITEMS, MIXED, ORACLE, SINGLE, macro, macro_difference  # noqa: E402
from moerge_ext.evaluation.evaluate import Score  # noqa: E402
from moerge_ext.evaluation.report import markdown  # noqa: E402
from moerge_ext.files.rows import read_rows  # noqa: E402

RESULTS = ROOT / "bench" / "results"
KINDS = {
    "clinc_banking": {"folder": "train", "judge": "contains"},
    "babi_qa15_deduction": {"folder": "train", "judge": "contains"},
    "gsm8k": {"folder": "heldout", "judge": "numeric"},
    "bbq_age": {"folder": "train", "judge": "choice"},
}
AFTER, STOP = "The answer is", "\n"
DEMONSTRATIONS = 64  # rows from which they are drawn, of gsm8k those below
SAMPLE_TOKENS = 24  # a choice is shorter; this model now and then finds no end
SHOWN_SAMPLES = 2  # with a demonstration: ten for each of four make prompts three times as long
SEED = 0
# Of the first rows of gsm8k's train.jsonl; the last number of each is the row's answer, or the data are others.
RATIONALES = (
    "He has 2 * 2 = 4 brothers, and 4 + 2 = 6 siblings. Each of them gets 12 / 6 = 2.",
    "6 trumpets and 9 clarinets weigh 15 * 5 = 75, 8 trombones 8 * 10 = 80, 3 tubas 3 * 20 = 60, "
    "2 drums 2 * 15 = 30. Together they weigh 75 + 80 + 60 + 30 = 245.",
    "18 members eat 18 * 2 = 36 biscuits, which are 36 / 9 = 4 batches. They need 4 * 1.25 = 5.",
    "28 ounces at 0.2 ounces a day last 28 / 0.2 = 140 days. These are 140 / 7 = 20.",
    "There are 600 * 0.2 = 120 more redwoods than pines, so 600 + 120 = 720. In total there are 720 + 600 = 1320.",
    "A year has 12 / 4 = 3 times four months: he drives 3 * 37000 = 111000. In 9 years it is 9 * 111000 = 999000.",
    "On five days 5 * 100 = 500 people came, in all 500 + 200 + 300 = 1000. They paid 1000 * 3 = 3000.",
    "16 pieces and 0.75 * 16 = 12 pieces were eaten, 16 + 12 = 28. With ice cream ate 28 - 4 = 24 guests, 24 * 2 = 48 "
    "scoops. These are 48 / 8 = 6.",
)


def rationale(kind: str, number_: int, row: dict) -> str | None:
    """The reasoning of a demonstration; None where the kind has none."""
    if kind == "gsm8k":
        text = RATIONALES[number_]
        if number(text) != number(row["target"]):
            raise SystemExit(f"row {number_} of gsm8k is another one than was written about: {row['input'][:80]!r}")
        return text
    if kind != "babi_qa15_deduction":
        return None
    facts = [sentence.strip() for sentence in row["input"].split(".")]
    name = re.search(r"What is (\w+) afraid of\?", row["input"])[1]
    own = next(fact for fact in facts if fact.lower().startswith(f"{name} is a "))
    animal = own.split()[-1]
    plural = {"wolf": "wolves", "mouse": "mice", "sheep": "sheep", "cat": "cats"}[animal]
    return f"{own}. {next(fact for fact in facts if fact.lower().startswith(plural + ' are'))}."


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(data: Path, cache: Path, train: int, test: int) -> None:
    """Questions, demonstrations and passages of every kind, none of them in two places."""
    for kind, facts in KINDS.items():
        source, folder = data / "tasks" / facts["folder"] / kind, cache / kind
        rows = read_rows(source / "train.jsonl")
        shown = len(RATIONALES) if kind == "gsm8k" else DEMONSTRATIONS
        pool = list(range(shown, len(rows)))
        asked = random.Random(f"{SEED} {kind}").sample(pool, train)
        demonstrations = []
        for i, row in enumerate(rows[:shown]):
            thought = rationale(kind, i, row)
            demonstrations.append({**row, **({"rationale": thought} if thought else {})})
        write_lines(folder / "demonstrations.jsonl", demonstrations)
        write_lines(folder / "train.jsonl", [{**rows[i], "dataset": kind} for i in asked])
        tests = read_rows(source / "test.jsonl")
        chosen = sorted(random.Random(f"{SEED} {kind}").sample(range(len(tests)), test))
        write_lines(folder / "test.jsonl", [{**tests[i], "dataset": kind} for i in chosen])
        (folder / "rows.json").write_text(json.dumps(chosen))
        if kind == "clinc_banking":
            known = [f"{rows[i]['input']}: {rows[i]['target']}" for i in pool if i not in set(asked)]
            (folder / "passages.txt").write_text("\n".join(known) + "\n", encoding="utf-8")


def write_prompts(cache: Path, shots: int) -> Path:
    special = {
        "clinc_banking": {"kind": "retrieval", "passages": "clinc_banking/passages.txt"},
        "babi_qa15_deduction": {"kind": "chain-of-thought"},
        "gsm8k": {"kind": "chain-of-thought"},
        "bbq_age": {"kind": "answer-prompting", "sample_tokens": SAMPLE_TOKENS, "demonstration_samples": SHOWN_SAMPLES},
    }
    files = {kind: f"{kind}/demonstrations.jsonl" for kind in KINDS}
    experts = [
        {"name": f"{kind} expert", "dataset": kind, "demonstrations": files[kind], "count": shots, **special[kind]}
        for kind in KINDS
    ]
    parts = {"experts": experts, "few_shot": {"demonstrations": files, "count": shots}, "answer_after": AFTER}
    path = cache / "prompts.json"
    path.write_text(json.dumps(parts | {"stop": [STOP], "max_new_tokens": 96}, indent=1))
    return path


def command(*words: object) -> None:
    if status := cli.main([str(word) for word in words]):
        raise SystemExit(status)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    cache = args.cache / f"pelmo-{args.train}-{args.test}-{args.shots}"
    prepare(args.data, cache, args.train, args.test)
    shared = ["--model", args.model, "--chat", "--prompts", write_prompts(cache, args.shots)]
    shared += ["--embedder", args.encoder, "--embedder-name", "all-MiniLM-L6-v2", "--batch-size", args.batch_size]
    shared += ["--dtype", args.dtype]
    shared += ["--judge", *(f"{kind}={facts['judge']}" for kind, facts in KINDS.items())]
    for name in ("train", "test"):
        files = [cache / kind / f"{name}.jsonl" for kind in KINDS]
        if name == "train":
            learn = ["train-router", *shared, "--data", *files, "--router", args.encoder, "--lr", args.lr]
            learn += ["--epochs", args.epochs, "--max-length", 128]
            for output, more in (("multi", ["--theta", args.theta]), ("single", ["--single-label"])):
                if not (cache / output / "moerge_router.json").is_file():
                    command(*learn, *more, "--output", cache / output)
        else:
            routers = ["--router", cache / "multi", "--single-label-router", cache / "single"]
            command("ensemble", *shared, "--data", *files, *routers, "--top-k", *args.top_k, "--output", cache / "out")
    write_results(args, cache)


def write_results(args: argparse.Namespace, cache: Path) -> None:
    """What the tables are made of: settings, and every answer with the row that it answers (not the row's text)."""
    left = {kind: json.loads((cache / kind / "rows.json").read_text()) for kind in KINDS}
    lines = []
    with gzip.open(cache / "out" / ITEMS, "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            said = {key: line[key] for key in ("dataset", "answers", "right")}
            lines.append({**said, "row": left[line["dataset"]].pop(0)})
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "pelmo_items.jsonl.gz").write_bytes(gzip.compress(text, mtime=0))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = ("train", "test", "shots", "epochs", "lr", "theta", "top_k", "threads", "batch_size", "dtype")
    facts = {name: getattr(args, name) for name in names} | {"seed": SEED, "commit": commit.stdout.strip()}
    facts |= {"model": Path(args.model).name, "encoder": "all-MiniLM-L6-v2", "torch": torch.__version__}
    facts |= {"taught": {kind: taught(cache, kind) for kind in KINDS}}
    facts |= {"machine": platform.machine(), "experts": [f"{kind} expert" for kind in KINDS], "kinds": KINDS}
    (args.results / "pelmo.json").write_text(json.dumps(facts, indent=1) + "\n")
    table(args)


def taught(cache: Path, kind: str) -> dict[str, int]:
    """How many training questions of a kind each expert answered right: what the multi-label router learned from."""
    rows = [(name, row) for name in KINDS for row in read_rows(cache / name / "train.jsonl")]
    right = {}
    for name in KINDS:
        (path,) = (cache / "multi" / "answers").glob(f"{name}_expert.*.jsonl")
        answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()[1:]]
        own = [(answer, row) for answer, (of, row) in zip(answers, rows, strict=True) if of == kind]
        judge = JUDGES[KINDS[kind]["judge"]]
        right[name] = sum(bool(judge("", final_answer(answer, AFTER), row["target"])) for answer, row in own)
    return right


def read_items(folder: Path) -> list[dict]:
    with gzip.open(folder / "pelmo_items.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def scores_of(items: list[dict]) -> list[Score]:
    """A score for every row and kind, from the items."""
    kinds = list(dict.fromkeys(item["dataset"] for item in items))
    scores = []
    for method in items[0]["right"]:
        for kind in kinds:
            said = tuple(item["right"][method] for item in items if item["dataset"] == kind)
            scores.append(Score(method, kind, "", "judge", len(said), sum(said), None, said))
    return scores


def check(items: list[dict], data: Path, experts: list[str]) -> None:
    """Judge every answer anew; SystemExit for a verdict that was another."""
    rows = {kind: read_rows(data / "tasks" / facts["folder"] / kind / "test.jsonl") for kind, facts in KINDS.items()}
    for item in items:
        kind, row = item["dataset"], rows[item["dataset"]][item["row"]]
        judge = JUDGES[KINDS[kind]["judge"]]
        right = {m: judge("", final_answer(a, AFTER), row["target"]) for m, a in item["answers"].items()}
        right[ORACLE] = any(right[name] for name in experts)
        if right != item["right"]:
            raise SystemExit(f"{kind}, row {item['row']}: kept {item['right']}, judged again {right}")


def tables(scores: list[Score], experts: list[str]) -> str:
    """Tables 1 and 2 in markdown, and what the paper claims against what is seen."""
    mixed = sorted({score.method for score in scores if score.method.startswith(MIXED)})
    first = ["specific few-shot", *experts, *mixed, ORACLE]
    second = [f"{MIXED}1", f"{MIXED}2", f"{SINGLE}1", f"{SINGLE}2"]
    parts = []
    for title, rows in (("Table 1", first), ("Table 2", second)):
        parts.append(f"{title}: % right, with 95 % intervals; the mean is the macro-average\n")
        parts.append(markdown([score for name in rows for score in scores if score.method == name]))
    best = max(experts, key=lambda name: macro(scores, name))
    lines = ["| claimed | seen here: difference of the macro-averages, paired 95 % interval |", "| --- | --- |"]
    for ours, theirs in (
        (f"{MIXED}1", best),
        (f"{MIXED}1", "specific few-shot"),
        (f"{MIXED}2", best),
        (f"{MIXED}2", "specific few-shot"),
        (f"{MIXED}2", f"{MIXED}1"),
        (f"{MIXED}2", f"{MIXED}4"),
        (f"{MIXED}2", f"{SINGLE}2"),
        (f"{MIXED}1", f"{SINGLE}1"),
    ):
        lines.append(f"| {ours} above {theirs} | {_points(scores, ours, theirs)} |")
    for kind in dict.fromkeys(score.task for score in scores):
        if (own := f"{kind} expert") in experts:
            of_kind = [score for score in scores if score.task == kind]
            lines.append(f"| {own} above specific few-shot on {kind} | {_points(of_kind, own, 'specific few-shot')} |")
    return "\n".join([*parts, *lines]) + "\n"


def _points(scores: list[Score], ours: str, theirs: str) -> str:
    mean, low, high = (100 * value for value in macro_difference(scores, ours, theirs))
    return f"{mean:+.1f} points, {low:+.1f} to {high:+.1f}"


def block(facts: dict, scores: list[Score]) -> str:
    """What README.md says of the run: its settings, then the tables."""
    count = len(facts["kinds"])
    said = (
        f"{facts['model']} in {facts['dtype']}, router {facts['encoder']}; {count * facts['train']} training and "
        f"{count * facts['test']} test questions, {facts['shots']} demonstrations in a prompt; threshold of the labels "
        f"{facts['theta']}, {facts['epochs']} epochs at {facts['lr']:g}; commit {facts['commit'][:10]}, "
        f"torch {facts['torch']}."
    )
    learned = "\n".join(
        f"| {kind} | " + " | ".join(str(right[name]) for name in facts["kinds"]) + " |"
        for kind, right in facts["taught"].items()
    )
    head = "| right of | " + " | ".join(f"{kind} expert" for kind in facts["kinds"]) + " |"
    rule = "| --- |" + " ---: |" * count
    taught = f"Of {facts['train']} training questions of each kind\n\n{head}\n{rule}\n{learned}"
    return f"{said}\n\n{tables(scores, facts['experts'])}\n{taught}"


def table(args: argparse.Namespace) -> None:
    if not (args.results / "pelmo.json").is_file():
        raise SystemExit(f"{args.results} has no pelmo.json: call `run` first")
    facts, items = json.loads((args.results / "pelmo.json").read_text()), read_items(args.results)
    if args.data is not None:
        check(items, args.data, facts["experts"])
    scores = scores_of(items)
    text = block(facts, scores)
    if args.results == RESULTS:
        fill("pelmo", text)
    plot_top_k(scores, facts["experts"], args.results / "pelmo_top_k.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, do in (("run", run), ("table", table)):
        sub = commands.add_parser(name)
        sub.set_defaults(do=do)
        sub.add_argument("--data", type=Path, required=name == "run", help="folder with tasks/")
        sub.add_argument("--results", type=Path, default=RESULTS)
        if name == "run":
            sub.add_argument("--cache", type=Path, required=True, help="questions, answers, routers")
            sub.add_argument("--model", required=True, help="a chat model: folder, hub id or GGUF file")
            sub.add_argument("--encoder", required=True, help="folder of all-MiniLM-L6-v2")
            sub.add_argument("--train", type=int, default=75, help="questions of every kind (default: %(default)s)")
            sub.add_argument("--test", type=int, default=125, help="questions of every kind (default: %(default)s)")
            sub.add_argument("--shots", type=int, default=4, help="demonstrations; the paper's are 16")
            sub.add_argument("--theta", type=float, default=0.7)
            sub.add_argument("--epochs", type=int, default=5)
            sub.add_argument("--lr", type=float, default=1e-4)
            sub.add_argument("--top-k", type=int, nargs="+", default=[1, 2, 3, 4], metavar="K", help="experts mixed")
            sub.add_argument("--batch-size", type=int, default=4)
            sub.add_argument("--threads", type=int, default=1)
            sub.add_argument("--dtype", default="float32", help="of the chat model (default: %(default)s)")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
