"""The committed tables of bench/quality are what the committed answers say."""

import copy
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from bench_checkout import REPO  # first: bench is importable after it

from bench.quality import (
    ensemble,
    real_answers,
    real_claims,
    real_differences,
    real_facts,
    real_join,
    real_rows,
    real_table,
    run,
)
from bench.quality.real_answers import Answered, Asked, Results
from bench.quality.real_scores import Scores
from bench.quality.real_verdicts import ABOVE, BELOW, CLOSE, margin, verdict
from moerge_ext.evaluation.metrics import GRADED, accuracy
from moerge_ext.evaluation.store import Answers
from moerge_ext.methods import METHODS

README = REPO / "bench" / "quality" / "README.md"
PATTERNS = (
    real_answers.FILES, real_answers.HELD_OUT_FILES, real_answers.OTHER_FILES, real_answers.VARIED_FILES
)  # fmt: skip


def block(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n*<!-- /{name} -->", README.read_text(encoding="utf-8"), re.DOTALL)[1]


def test_committed_answers_make_the_committed_tables():
    for name, text in real_table.blocks().items():
        assert block(name) == text, f"run python bench/quality/real_table.py: {name} differs"


def test_committed_answers_are_right_where_they_say_so():
    found = [results for pattern in PATTERNS for results in real_answers.read_all(files=pattern).values()]
    assert found
    every = ((r, a) for r in found for a in r.answered.values() if r.tasks[a.task]["metric"] not in GRADED)
    for results, answered in every:
        assert real_answers.scored_again(results, answered) == answered.right, (answered.run, answered.task)


def test_every_method_is_asked():
    """But `given`, whose weights are the caller's."""
    groups = [value for name, value in vars(real_rows).items() if name.isupper() and isinstance(value, tuple)]
    asked = {row.partition("/")[0] for group in groups for row in group} | {"meteora"}
    assert asked == METHODS.keys() - {"given"} | {"base"}


def test_packed_chunks_come_back_joined(tmp_path):
    """Through the files that an evaluation keeps; the second chunk has other items of the same task."""
    chunks = []
    for number, answers in enumerate((["yes", "No."], ["maybe"])):
        rows = [{"input": f"{number}{i}", "target": "no"} for i in range(len(answers))]
        asked = SimpleNamespace(name="a", part="train", metric="accuracy", chance=0.5, rows=rows)
        stored = Answers(tmp_path / f"{number}" / "answers" / "a", "base", {"run": "base", "task": "a"})
        stored.add([{"answer": answer, "right": accuracy(answer, "no")} for answer in answers])
        parts = [SimpleNamespace(method="base", task="a")]
        chunks.append([Asked(tmp_path / f"{number}", [asked], parts, suffix="/x=1")])
    real_answers.pack(chunks, {"experts": {}}, tmp_path / "packed.gz")
    results = real_answers.read(tmp_path / "packed.gz")
    assert results.answered["base/x=1", "a"].answers == ("yes", "No.", "maybe")
    assert results.answered["base/x=1", "a"].right == (False, True, False)
    assert real_answers.scored_again(results, results.answered["base/x=1", "a"]) == (False, True, False)
    assert "no" not in results.tasks["a"]["targets"], "the data are not to be copied"


def test_answers_of_two_kinds_under_one_name_are_refused(tmp_path):
    for setting in (1, 2):
        stored = Answers(tmp_path / "answers" / "a", "base", {"run": "base", "task": "a", "setting": setting})
        stored.add([{"answer": "no", "right": True}])
    asked = SimpleNamespace(name="a", part="train", metric="accuracy", chance=None, rows=[])
    with pytest.raises(ValueError, match="delete the old"):
        real_answers.pack([[Asked(tmp_path, [asked], [])]], {"experts": {}}, tmp_path / "packed.gz")


def asked_later(old: Results, *, other: int = 0) -> Results:
    """The rows that are checked, of which "merged" has so many other answers, and a new row."""
    answered = {(run, task): old.answered[run, task] for run in real_join.CHECKED for task in old.tasks}
    task = next(iter(old.tasks))
    first = answered["merged", task]
    answered["merged", task] = replace(first, answers=("another",) * other + first.answers[other:])
    answered |= {("new", name): replace(old.answered["base", name], run="new") for name in old.tasks}
    return Results(copy.deepcopy(old.facts), copy.deepcopy(old.tasks), answered)


def test_rows_join_when_the_experts_are_the_same(tmp_path):
    old = real_answers.main_pool(real_answers.read_all())
    old = replace(old, facts={key: value for key, value in old.facts.items() if key != "again"})
    items = sum(len(task["targets"]) for task in old.tasks.values())
    made = real_join.joined(old, asked_later(old, other=2))
    assert made.runs == [*old.runs, "new"]
    assert made.facts["again"]["rows"] == ["new"]
    assert made.facts["again"]["answers"] == {
        "base": [items, items], "merged": [items, items - 2], "retrieval": [items, items]
    }  # fmt: skip
    assert made.facts["again"]["losses"] == [len(old.facts["experts"])] * 2
    assert made.answered["merged", next(iter(old.tasks))] == old.answered["merged", next(iter(old.tasks))]
    assert f"merged {items - 2} of {items}" in real_facts.facts(made)
    assert real_join.joined(made, asked_later(old)).facts["again"]["rows"] == ["new"], "asked in two goes"
    real_answers.write(made, tmp_path / "again.gz")
    assert real_answers.read(tmp_path / "again.gz").answered == made.answered


def test_rows_of_other_experts_or_questions_do_not_join():
    old = real_answers.main_pool(real_answers.read_all())
    items = sum(len(task["targets"]) for task in old.tasks.values())
    with pytest.raises(ValueError, match=f"merged: {items - 20} of {items} answers are those of before"):
        real_join.joined(old, asked_later(old, other=20))
    other = asked_later(old)
    other.facts["recipe"]["steps"], name = 7, next(iter(old.tasks))
    other.tasks[name]["targets"][0] = "another"
    with pytest.raises(ValueError, match=rf"(?s)other items or metric of {name}.*recipe: .*'steps': 7"):
        real_join.joined(old, other)
    missing = replace(other, answered={key: a for key, a in other.answered.items() if key[0] != "base"})
    bare = replace(old, facts={key: value for key, value in old.facts.items() if key != "again"})
    with pytest.raises(ValueError, match="base has not been asked again"):
        real_join.joined(bare, missing)


def test_written_answers_are_the_same_bytes(tmp_path):
    for file in (file for pattern in PATTERNS for file in real_answers.FOLDER.glob(pattern)):
        real_answers.write(real_answers.read(file), tmp_path / file.name)
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def small() -> Results:
    tasks = {n: {"part": "train", "metric": "accuracy", "targets": ["x"] * 4, "chance": None} for n in ("a", "b")}
    marks = {"base": ("0000", "0011"), "expert:a": ("1110", "0000"), "expert:b": ("0001", "1111")}
    answered = {
        (run, task): Answered(run, task, ("",) * 4, tuple(m == "1" for m in text))
        for run, texts in marks.items()
        for task, text in zip(tasks, texts, strict=True)
    }
    return Results({}, tasks, answered)


def test_scores_by_hand():
    scores = Scores(small())
    assert scores.rows == ["base", "oracle_dataset", "best_individual"]
    assert scores.mean("base", ["a", "b"])[0] == 25
    assert scores.mean("oracle_dataset", ["a", "b"])[0] == 87.5
    assert scores.mean("best_individual", ["a", "b"])[0] == 62.5
    value, low, high = scores.difference("expert:a", "expert:b", ["a"])
    assert value == 50 and low <= 50 <= high and low >= -100 and high == 100
    assert scores.difference("base", "base", ["a", "b"]) == (0, 0, 0)


def test_a_difference_is_as_sure_as_theory_says():
    """Two tasks of 400 items, of which a quarter and a half are right: the variances of independent means add up."""
    marks = {"a": np.arange(400) % 4 == 0, "b": np.arange(400) % 2 == 0}
    tasks = {name: {"part": "train", "metric": "accuracy", "targets": ["x"] * 400, "chance": None} for name in marks}
    answered = {("base", n): Answered("base", n, ("",) * 400, (False,) * 400) for n in marks}
    answered |= {("merged", n): Answered("merged", n, ("",) * 400, tuple(m.tolist())) for n, m in marks.items()}
    value, low, high = Scores(Results({}, tasks, answered)).difference("merged", "base", ["a", "b"])
    half = 196 * np.sqrt((0.25 * 0.75 + 0.5 * 0.5) / 400) / 2
    assert value == 37.5 and (low, high) == pytest.approx((37.5 - half, 37.5 + half), abs=0.4)


@pytest.mark.parametrize(
    "answer, metric, same", [("Yes.", "accuracy", True), ("Yes.", "exact_match", False), (" yes ", "exact_match", True)]
)
def test_an_answer_is_scored_by_the_digest_of_its_target(answer, metric, same):
    assert (real_answers.digest(answer, metric) == real_answers.digest("yes", metric)) is same


def three_tasks(**marks: tuple[str, str, str]) -> Scores:
    """Rows by their marks on held-out tasks a, b and c."""
    size = len(next(iter(marks.values()))[0])
    tasks = {n: {"part": "heldout", "metric": "accuracy", "targets": ["x"] * size, "chance": None} for n in "abc"}
    answered = {
        (run, task): Answered(run, task, ("",) * size, tuple(m == "1" for m in text))
        for run, texts in marks.items()
        for task, text in zip(tasks, texts, strict=True)
    }
    return Scores(Results({}, tasks, answered))


ONE, ALL, MOST, NONE = "1" * 40 + "0" * 40, "1" * 80, "1" * 60 + "0" * 20, "0" * 80


def test_a_verdict_names_the_task_that_decides():
    scores = three_tasks(row=(ALL, ONE, ONE), other=(ONE, ONE, ONE), low=(NONE, NONE, NONE))
    found = verdict(scores.differences("row", "other", list("abc")))
    assert found.word == ABOVE and list(found.other) == ["a"]
    assert found.rests_on == "`a`: without it not told apart, +0.0 (+0.0 to +0.0)"
    assert verdict(scores.differences("row", "low", list("abc"))).rests_on == "no single task"
    assert verdict(scores.differences("low", "other", list("abc"))).word == BELOW


def test_a_margin_is_of_the_tasks_that_tell_rows_from_chance():
    scores = three_tasks(row=(MOST, NONE, NONE), other=(MOST, NONE, NONE))
    assert scores.telling(list("abc")) == ["a"]
    assert margin(scores, list("abc")) == pytest.approx(CLOSE / 3)


def test_claims_say_what_they_rest_on():
    scores = three_tasks(glider=(ONE, ONE, ONE), phatgoose=(ALL, ONE, ONE), base=(NONE, NONE, NONE))
    asked = real_claims.Asked(scores, pools={4: scores})
    claim = real_claims.Claim("P", "surpasses", "glider", "phatgoose", "heldout")
    assert "| below (fragile): -16.7 (" in real_claims.line(claim, asked)
    assert "| `a`: without it not told apart" in real_claims.line(claim, asked)
    assert "| no, the reverse: -50.0 (" in real_claims.line(replace(claim, better="base", worse="glider"), asked)
    best = real_claims.line(replace(claim, worse=real_claims.OTHERS, pool=4), asked)
    assert "against the best other row, `phatgoose` | below (fragile)" in best
    assert real_claims.line(replace(claim, pool=8), asked) == "| P | surpasses | not run | | |"


def test_pools_are_paired_on_the_same_items():
    rows = {"phatgoose": (ALL, ONE, ONE), "retrieval": (ONE,) * 3, "merged": (ONE,) * 3, "expert:a": (ONE,) * 3}
    scores = {size: three_tasks(**rows) for size in (4, 8)}
    text = real_differences.pools(scores, list("abc"))
    assert "| phatgoose, k = 2 minus merged | **+16.7 (" in text and ")**\\* |" in text
    assert "| merged | +0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) |" in text
    scores[8].results.tasks["b"]["targets"] = ["y"] * 80
    with pytest.raises(ValueError, match="were asked others of b"):
        real_differences.pools(scores, list("abc"))


def test_tables_of_other_results_leave_the_readme(tmp_path, monkeypatch):
    for file in real_answers.FOLDER.glob(real_answers.FILES):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = README.read_bytes()
    monkeypatch.setattr("sys.argv", ["real_table.py", "--results", str(tmp_path)])
    real_table.main()
    assert README.read_bytes() == before
    text = (tmp_path / "tables.md").read_text()
    assert block("real-scaling") in text and "## real-more\n\n\n" in text, "no results of that kind are there"


def test_small_tables_are_what_their_results_say():
    """Of stories260K, whose answers were not kept."""
    rows = [json.loads(line) for line in run.RESULTS.read_text().splitlines()]
    assert block("table") == run.table(rows)
    assert block("ensemble") == ensemble.table(json.loads(ensemble.RESULT.read_text()))
    assert "`dam`" in run.missing([row for row in rows if row["method"] != "dam"])
