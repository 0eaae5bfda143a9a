"""Answers that can be partly right, and pools that were made in other ways."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from bench_checkout import REPO  # first: bench is importable after it

from bench.quality import real, real_answers, real_facts, real_table, real_tasks, real_variants, real_weights
from bench.quality.real_answers import Answered, Asked, Results
from bench.quality.real_scores import Scores
from moerge_ext.evaluation.metrics import GRADED, SCORES
from moerge_ext.evaluation.store import Answers

FILES = (real_answers.OTHER_FILES, real_answers.VARIED_FILES)


def graded(tmp_path) -> Results:
    rows = [{"input": f"{i}", "target": "one two"} for i in range(3)]
    asked = SimpleNamespace(name="a", part="heldout", metric="f1", chance=None, rows=rows)
    stored = Answers(tmp_path / "answers" / "a", "phatgoose", {"run": "phatgoose", "task": "a"})
    stored.add([{"answer": text, "right": SCORES["f1"](text, "one two")} for text in ("one", "one two", "three")])
    facts = {"experts": {}}
    return real_answers.collected([[Asked(tmp_path, [asked], [SimpleNamespace(method="phatgoose", task="a")])]], facts)


def test_an_answer_that_is_partly_right_stays_so(tmp_path):
    real_answers.write(graded(tmp_path), tmp_path / "packed.gz")
    results = real_answers.read(tmp_path / "packed.gz")
    answered = results.answered["phatgoose", "a"]
    assert answered.right == (0.6667, 1.0, 0.0)
    scores = Scores(results)
    assert scores.mean("phatgoose", ["a"])[0] == pytest.approx(100 * 1.6667 / 3)
    with pytest.raises(ValueError, match="a: f1 cannot be made of digests"):
        real_answers.scored_again(results, answered)
    lines = real_table.held_out(scores).splitlines()
    assert lines[2] == "| a (f1) | 3 | 56 |", "a score has no chance"
    assert lines[3].startswith("| mean | | 55.6 (") and lines[4] == "| minus phatgoose | |  |"


def test_tasks_asked_apart_join_by_the_rows_of_both(tmp_path):
    first = graded(tmp_path)
    more = first.answered | {("base", "a"): replace(first.answered["phatgoose", "a"], run="base")}
    other = Results({}, {"b": first.tasks["a"]}, {("phatgoose", "b"): first.answered["phatgoose", "a"]})
    made = real_answers.together([replace(first, answered=more), other])
    assert list(made.tasks) == ["a", "b"] and made.runs == ["phatgoose"]
    assert real_answers.together([]) is None


def test_committed_answers_are_scored_again_by_the_data(shared):
    """Where an answer can be partly right; the others are scored by digests in test_quality.py."""
    places, found = real.Places(shared / "data", shared), 0
    for results in (r for pattern in FILES for r in real_answers.read_all(files=pattern).values()):
        for answered in (a for a in results.answered.values() if results.tasks[a.task]["metric"] in GRADED):
            rows = places.rows(answered.task, "test")
            rows = random.Random(0).sample(rows, len(rows))[: len(answered.answers)]
            metric = SCORES[results.tasks[answered.task]["metric"]]
            again = [metric(a, row["target"]) for a, row in zip(answered.answers, rows, strict=True)]
            assert answered.right == pytest.approx(again, abs=10.0**-real_answers.SCORE_DIGITS)
            found += 1
    assert found


@pytest.mark.parametrize(
    "run, row, change",
    [
        ("phatgoose/norm=0.5", "phatgoose", "/norm=0.5"),
        ("phatgoose/gates=12x16", "phatgoose", "/gates=12x16"),
        ("phatgoose/top_k=3", "phatgoose/top_k=3", ""),
        ("glider/top_k=none/top_p=0.5 (zero-shot)", "glider/top_k=none/top_p=0.5 (zero-shot)", ""),
    ],
)
def test_a_change_stands_behind_the_row(run, row, change):
    assert real_variants.split(run) == (row, change)


def test_every_change_is_of_a_known_kind():
    assert all(real_variants.split("phatgoose" + change) == ("phatgoose", change) for change in real_variants.CHANGES)
    assert len(set(real_variants.RUNS)) == len(real_variants.RUNS)


def test_variants_are_compared_with_the_rows_of_the_same_pool():
    marks = {
        "phatgoose": "1100", "retrieval": "1110", "merged": "1000", "average_activation": "0000",
        "phatgoose/norm=0.5": "1111", "retrieval/norm=0.5": "0000", "merged/norm=0.5": "1111",
        "average_activation/norm=0.5": "1100", "phatgoose/gates=100": "1110",
    }  # fmt: skip
    tasks = {"a": {"part": "heldout", "metric": "accuracy", "targets": ["x"] * 4, "chance": None}}
    answered = {(run, "a"): Answered(run, "a", ("",) * 4, tuple(m == "1" for m in text)) for run, text in marks.items()}
    text, changes = real_variants.table(Scores(Results({}, tasks, answered))).split("\n\n| with minus")
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines() if line[:1] == "|"}
    assert cells[real_variants.CHANGES["/norm=0.5"]][0].startswith("100.0 ")
    assert [cell.split(" ")[0] for cell in cells[real_variants.CHANGES["/norm=0.5"]][4:]] == [
        "**+100.0",
        "+0.0",
        "+50.0",
    ]
    gates = cells[real_variants.CHANGES["/gates=100"]]
    assert gates[1:4] == [""] * 3, "gates change nothing of the other rows"
    assert gates[4].startswith("+0.0 "), "which are those of the pool as it is"
    assert real_variants.CHANGES["/layers=10"] not in text + changes, "not asked"
    half = next(line for line in changes.splitlines() if real_variants.CHANGES["/norm=0.5"] in line)
    assert [cell.split(" ")[0] for cell in half.split(" | ")[1:]] == ["+50.0", "**-75.0", "**+75.0", "+50.0"]


def test_other_tasks_share_no_answers_to_compare(tmp_path):
    results = graded(tmp_path)
    made = {"cpu_s": 1.0, "losses": [1.0]}
    facts = {"recipe": {}, "experts": {"x": {"expert": made}}}
    other = Results(facts, {"b": results.tasks["a"]}, {("phatgoose", "b"): results.answered["phatgoose", "a"]})
    main = replace(results, facts={"recipe": {}, "experts": {"x": {"expert": made | {"cpu_s": 2.0}}}})
    (said,) = real_facts._others(main, {"those": other})
    assert said.endswith("those (1 of 1 with the same losses in every step).")


def test_the_tasks_are_those_of_the_papers_part(shared):
    """Every held-out task there is, each once; those that are asked apart have rows of their own kind."""
    folders = {path.name for path in (shared / "data" / "tasks" / "heldout").iterdir()}
    assert sorted((*real.HELD_OUT, *real.OTHERS)) == sorted(folders)
    assert real.Places(REPO, REPO).source(real.OTHERS[0]).parent.name == "heldout"


def test_a_graded_task_stays_open(shared, tmp_path):
    folder = real_tasks.write_task(real.Places(shared / "data", tmp_path), "e2e_nlg", 0, 4)
    assert '"rougeL"' in (folder / "meta.json").read_text()


def test_where_the_weight_goes_of_a_method_that_is_told_the_task():
    facts = {"weights": {"a": {"a": 0.25, "b": 0.75}, "b": {"a": 0.5, "b": 0.5}}}
    assert "| a | 25 | b 75 |" in real_weights.table(Results(facts, {}, {})).splitlines()
    assert "| not run |" in real_weights.claim(Results(facts, {}, {}))
    facts |= {"weights_told": {"a": {"a": 1.0, "b": 0.0}, "b": {"a": 0.25, "b": 0.75}}}
    assert "| a | 25 | b 75 | 100 | b 0 |" in real_weights.table(Results(facts, {}, {})).splitlines()
    assert "| yes: 88 % of its weight against 38, more on 2 of the tasks | 2, 8 |" in real_weights.claim(
        Results(facts, {}, {})
    )
