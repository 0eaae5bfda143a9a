"""The tables of SmolLM2-135M-Instruct in README.md, from the answers in bench/results/quality_real_*.jsonl.gz.

python bench/quality/real_table.py
python bench/quality/real_table.py --results CACHE/results     # of another folder, into its tables.md
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.quality import (  # noqa: E402
    real_ablation,
    real_answers,
    real_claims,
    real_differences,
    real_facts,
    real_nearness,
    real_variants,
    real_weights,
    tasks,
)
from bench.quality.real_answers import Results  # noqa: E402
from bench.quality.real_names import shown_name  # noqa: E402
from bench.quality.real_rows import ABLATED  # noqa: E402
from bench.quality.real_scores import PREFIX, Scores  # noqa: E402
from bench.quality.real_verdicts import ABOVE, told  # noqa: E402
from moerge_ext.evaluation.metrics import GRADED  # noqa: E402
from moerge_ext.methods import METHODS  # noqa: E402

PARTS = {"train": "held-in", "heldout": "held-out"}
AGAINST = "phatgoose"  # whose difference to every row is shown
SCALED = ("base", "merged", "retrieval", "phatgoose", "oracle_dataset")


def means(scores: Scores) -> str:
    """Rows of methods: mean over the tasks of each part, and the paired difference to AGAINST; no ablations."""
    parts = {part: scores.results.part(part) for part in PARTS}
    head = [f"{PARTS[p]}: {len(names)} tasks | minus {AGAINST}" for p, names in parts.items()]
    lines = ["| row | " + " | ".join(head) + " |", "| --- |" + " ---: |" * (2 * len(parts))]
    for row in (row for row in scores.rows if row not in ABLATED):
        cells = []
        for names in parts.values():
            cells.append("{:.1f} ({:.0f}-{:.0f})".format(*scores.mean(row, names)))
            difference = "{:+.1f} ({:+.0f} to {:+.0f})".format(*scores.difference(row, AGAINST, names))
            cells.append("" if row == AGAINST else difference)
        lines.append(f"| {shown_name(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def matrix(scores: Scores) -> str:
    """Experts by held-in tasks, the expert's own in bold; the base on top."""
    names = scores.results.part("train")
    lines = ["| expert | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in ("base", *scores.experts):
        own = row.removeprefix("expert:")
        values = [scores.mean(row, [name])[0] for name in names]
        cells = [f"**{v:.0f}**" if name == own else f"{v:.0f}" for name, v in zip(names, values, strict=True)]
        lines.append(f"| {own} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{clearly_best(scores, names)}"


def clearly_best(scores: Scores, names: Sequence[str]) -> str:
    """Which experts are told from the base and from every other expert, on their own tasks."""
    rows = ["base", *scores.experts]
    best = [
        name
        for name in names
        if (own := PREFIX + name) in rows
        and all(told(scores.difference(own, row, [name])) == ABOVE for row in rows if row != own)
    ]
    other = ", ".join(name for name in names if name not in best)
    return (
        f"Told from the base and from every other expert on their own task: {len(best)} of {len(names)}; not: {other}."
    )


def by_task(scores: Scores, part: str) -> str:
    names = scores.results.part(part)
    rows = [row for row in scores.rows if row not in ABLATED]
    lines = ["| row | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row in rows:
        lines.append(f"| {shown_name(row)} | " + " | ".join(f"{scores.mean(row, [n])[0]:.0f}" for n in names) + " |")
    return "\n".join(lines)


def written(results: Results) -> str:
    """What the base wrote of the experts, and of how many queries it wrote nothing."""
    if (made := results.facts.get("written")) is None:
        return ""
    begun = {name: text[:80] + "..." * (len(text) > 80) for name, text in made["instructions"].items()}
    lines = [f"| {name} | {text.replace('|', '&#124;')} |" for name, text in begun.items()]
    table = "\n".join(["| expert | its task, as the base says it of three examples |", "| --- | --- |", *lines])
    none = f"Of {made['queries']} queries it wrote no instruction for {made['none']}, which stand for themselves."
    return f"{table}\n\n{none}"


def chance(results: Results, names: Sequence[str]) -> str:
    known = {n: results.tasks[n]["chance"] for n in names if results.tasks[n]["chance"] is not None}
    return ", ".join(f"{name} {100 * value:.0f}" for name, value in known.items())


def scaling(pools: dict[int, Results]) -> str:
    """Rows of methods by the size of the pool, on the held-out tasks that all of them answered."""
    names = [
        name for name in next(iter(pools.values())).tasks if all(name in r.part("heldout") for r in pools.values())
    ]
    made = {size: Scores(results) for size, results in pools.items()}
    lines = ["| row | " + " | ".join(f"{size} experts" for size in made) + " |", "| --- |" + " ---: |" * len(made)]
    for row in SCALED:
        if all(row in scores.known for scores in made.values()):
            cells = ("{:.1f} ({:.0f}-{:.0f})".format(*scores.mean(row, names)) for scores in made.values())
            lines.append(f"| {shown_name(row)} | " + " | ".join(cells) + " |")
    return (
        "\n".join(lines)
        + f"\n\n{real_differences.pools(made, names)}\n\nThe {len(names)} held-out tasks, the same items."
    )


def held_out(scores: Scores | None) -> str:
    """Rows that were asked more of the held-out tasks; of answers that can be partly right the mean score."""
    if scores is None:
        return ""
    tasks, rows = scores.results.tasks, scores.rows
    whole = [name for name in tasks if tasks[name]["metric"] not in GRADED]
    telling = scores.telling(whole)
    lines = [f"| task | items | {' | '.join(map(shown_name, rows))} |", "| --- |" + " ---: |" * (len(rows) + 1)]
    for name, task in tasks.items():
        mark = "\\*" if name in whole and name not in telling else ""
        graded = f" ({task['metric']})" if name not in whole else ""
        cells = " | ".join(f"{scores.mean(row, [name])[0]:.0f}" for row in rows)
        lines.append(f"| {name}{graded}{mark} | {len(task['targets'])} | {cells} |")
    means = ("{:.1f} ({:.0f}-{:.0f})".format(*scores.mean(row, list(tasks))) for row in rows)
    differences = {row: scores.difference(row, AGAINST, list(tasks)) for row in rows if row != AGAINST}
    minus = ("{:+.1f} ({:+.1f} to {:+.1f})".format(*differences[row]) if row in differences else "" for row in rows)
    lines.append(f"| mean | | {' | '.join(means)} |")
    lines.append(f"| minus {AGAINST} | | {' | '.join(minus)} |")
    return "\n".join(lines) + "\n\n\\*: no row is told from chance (open answers: 5 %). ROUGE-L: the score."


def missing(results: Results) -> str:
    """The rows of METHODS that were not asked; of `given` the caller has the weights."""
    asked = {re.split(r"[ /]", run)[0] for run in results.runs}
    names = [f"`{name}`" for name in METHODS if name not in asked | {"given"}]
    return f"Of the rows of METHODS {', '.join(names) if names else 'each was asked'}."


def blocks(folder: Path = real_answers.FOLDER) -> dict[str, str]:
    """Every generated block of README.md, of the main pool but for the one that compares them."""
    pools = real_answers.read_all(folder)
    results = real_answers.main_pool(pools)
    scores, size = Scores(results), len(results.facts["experts"])
    asked = real_answers.read_all(folder, real_answers.HELD_OUT_FILES).get(size)
    rest = real_answers.read_all(folder, real_answers.OTHER_FILES).get(size)
    held = real_answers.together([r for r in (asked, rest) if r is not None])
    more = None if held is None else Scores(held)
    varied = real_answers.read_all(folder, real_answers.VARIED_FILES).get(size)
    beside = {f"the pool of {n}": pool for n, pool in pools.items() if pool is not results}
    beside |= {} if asked is None else {"*Held-out tasks, asked more*": asked}
    beside |= {} if rest is None else {"the seven held-out tasks that were asked last": rest}
    beside |= {} if varied is None else {"*The pool made in other ways*": varied}
    guess = f"Chance, where answers are ranked: {chance(results, list(results.tasks))}; elsewhere answers are open."
    return {
        "real-facts": real_facts.facts(results, beside),
        "real-means": means(scores) + "\n\n" + guess,
        "real-matrix": matrix(scores),
        "real-weights": real_weights.table(results),
        "real-nearness": real_nearness.table(results),
        "real-ablation": real_ablation.table(scores),
        "real-heldin": by_task(scores, "train"),
        "real-heldout": by_task(scores, "heldout"),
        "real-claims": real_claims.table(real_claims.Asked(scores, more, {n: Scores(r) for n, r in pools.items()})),
        "real-differences": real_differences.table(scores, more),
        "real-more": held_out(more),
        "real-varied": real_variants.table(None if varied is None else Scores(varied)),
        "real-scaling": scaling(pools),
        "real-written": written(results),
        "real-missing": missing(results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=real_answers.FOLDER, help="(default: %(default)s)")
    folder = parser.parse_args().results
    with np.errstate(all="raise"):  # a mean of nothing is an error here, not a NaN in a table
        made = blocks(folder)
    if folder.resolve() == real_answers.FOLDER:
        for name, text in made.items():
            tasks.fill(name, text)
    else:
        (folder / "tables.md").write_text("\n".join(f"## {name}\n\n{text}\n" for name, text in made.items()))


if __name__ == "__main__":
    main()
