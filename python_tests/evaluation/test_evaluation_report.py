"""Intervals, the tables and the chart of an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_evaluation import score

from moerge_ext.evaluation.cost import Cost
from moerge_ext.evaluation.metrics import paired_difference, wilson
from moerge_ext.evaluation.report import COST, bars, cells, markdown, mean, share, terminal, terminal_costs, write
from moerge_ext.evaluation.report import costs as report_costs
from moerge_ext.evaluation.scores import derive


def test_wilson_interval():
    low, high = wilson(8, 10)  # Newcombe 1998 gives 0.490 to 0.943
    assert low == pytest.approx(0.4902, abs=1e-4) and high == pytest.approx(0.9433, abs=1e-4)
    assert wilson(0, 20)[0] == 0 and wilson(20, 20)[1] == 1 and wilson(0, 0) == (0, 1)


def test_paired_difference():
    got = paired_difference([1, 1, 0, 1], [0, 1, 0, 1])
    assert got == pytest.approx((0.25, 0.25 - 1.95996 * 0.25, 0.25 + 1.95996 * 0.25), abs=1e-4)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1, 0], [1])
    assert paired_difference([1], [0]) == (1, -1, 1) and paired_difference([1, 1, 0], [0, 0, 0])[2] == 1


def test_table():
    rows = cells([score("m", "s", 9), score("m", "t", 1), score("m", "u", 5, part="heldout")])
    assert rows[0] == ["", "mean held-in (n=20)", "mean held-out (n=10)", "s (n=10)", "t (n=10)", "u (n=10)"]
    assert rows[1] == ["chance", "50.0", "50.0", "50.0", "50.0", "50.0"]
    assert rows[2][:2] == ["m", "50.0 (34-66)"] and rows[2][3] == "90.0 (60-98)"
    wide = [score(f"m{i}", f"t{j}", 5, part="heldout" if j else "train") for i in range(7) for j in range(7)]
    assert [len(terminal(scores).columns) for scores in (wide[:7], wide)] == [3, 3]
    assert [terminal(scores).row_count for scores in (wide[:7], wide)] == [9, 8]  # every task, or every method
    assert markdown([score("m", "s", 9)]).splitlines()[1] == "| --- | ---: | ---: |"


def test_the_interval_of_a_mean():
    assert mean([score("m", "s", 3)]) == pytest.approx((0.3, *wilson(3, 10)))
    low, high = wilson(0, 10)
    assert mean([score("m", t, 0) for t in "abcd"]) == pytest.approx((0, low, high / 2))  # four times the items
    for right in (0, 1, 10):
        value, low, high = mean([score("m", t, right, n=10) for t in "abc"] + [score("m", "d", 1, n=1)])
        assert 0 <= low < high <= 1 and low <= value <= high
    assert cells([score("m", "s", 0)])[-1] == ["m", "0.0 (0-28)", "0.0 (0-28)"]


def test_open_answers_have_no_chance(tmp_path):
    opened = [replace(score("m", task, 5), chance=None) for task in "st"]
    assert [row[0] for row in cells(opened)] == ["", "m"]
    rows = cells([*opened, score("m", "u", 5), score("m", "v", 5, part="heldout")])
    assert rows[1] == ["chance", "-", "50.0", "-", "-", "50.0", "50.0"]
    written = write(opened, tmp_path)
    assert [row["chance"] for row in json.loads((tmp_path / "results.json").read_text())] == [None, None]
    pytest.importorskip("matplotlib")
    assert tmp_path / "results.png" in written
    assert bars([*opened, score("m", "u", 5)], tmp_path / "mixed.png").stat().st_size > 5000


def test_the_table_of_costs(tmp_path):
    """Sums over tasks, one row a method; a baseline that is made of others has none."""
    costs = [Cost(10, 2.0, 100, 20, 10, 0), Cost(30, 2.0, 300, 60, 0, 40)]
    scores = [replace(score("m", task, 5), cost=cost) for task, cost in zip("st", costs, strict=True)]
    scores += derive([replace(s, method="expert:a") for s in scores], ["oracle_dataset"])
    assert report_costs(scores) == [["cost per answer", *COST], ["m", "100", "0.1", "2", "0.25", "1"]]
    assert terminal_costs(scores).row_count == 1 and "| m | 100 | 0.1 | 2 | 0.25 | 1 |" in markdown(scores)
    write(scores, tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[0]["tokens_per_second"] == 50 and rows[1]["written"] == pytest.approx(40 / 30, abs=1e-5)
    assert rows[2]["seconds"] is None and "cost" not in markdown([score("m", "s", 5)])


def test_partly_right_answers_are_no_shares_of_right_ones():
    mixed = [replace(score("m", "s", 0), metric="rougeL", right=2.5, items=(0.25,) * 10), score("m", "t", 5)]
    rows = cells(mixed)
    assert rows[0][2:] == ["s (rougeL, n=10)", "t (n=10)"] and rows[2][2] == share(0.25, *wilson(2.5, 10))
    assert "score in %" in terminal(mixed).title and "% right" in terminal(mixed[1:]).title


def test_a_chart_that_cannot_be_written_names_itself(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "results.png").mkdir()
    with pytest.raises(OSError, match=f"{tmp_path / 'results.png'}"):
        bars([score("m", "s", 5)], tmp_path / "results.png")
    assert [path.name for path in tmp_path.iterdir()] == ["results.png"]
