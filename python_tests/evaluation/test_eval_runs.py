"""Rows of `moerge eval --methods`."""

from __future__ import annotations

import pytest

from moerge_ext.evaluation.runs import ablation, parse_run, parse_runs, split_methods, with_top_k


def test_runs_are_parsed_and_checked():
    run = parse_run("glider_code/alpha=10/top_k=1")
    assert run.method == "glider_code" and run.options == {"alpha": 10, "top_k": 1}
    runs, derived = parse_runs(["base", "merged", "oracle_dataset"], ("a", "b"))
    assert [r.label for r in runs] == ["base", "merged", "expert:a", "expert:b"] and derived == ["oracle_dataset"]
    for texts, text in (
        (["nonsense"], "unknown method 'nonsense'; expected one of .*base, oracle_dataset, .*pelmo:FILE, model:DIR"),
        (["Phatgose"], "unknown method 'Phatgose'; did you mean 'phatgoose'[?] `moerge methods`"),
        (["oracle_datset"], "did you mean 'oracle_dataset'"),
        (["arrow/bogus=1"], "unknown option"),
        (["expert:c"], "no expert named 'c'; there are: a, b"),
        (["base/top_k=1"], "takes no options"),
    ):
        with pytest.raises(ValueError, match=text):
            parse_runs(texts, ("a", "b"))


def test_lists_of_an_option_are_not_rows():
    """`mole/without=ant,bee` is one row; what begins a row ends the list."""
    assert split_methods("base, phatgoose/top_k=3 ,,expert:a") == ["base", "phatgoose/top_k=3", "expert:a"]
    rows = ["pwe_moe/preference=0.6,0.3,0.1", "mole/without=ant,bee/reads=input", "mole/without=cat", "model:x", "base"]
    assert split_methods(",".join(rows)) == rows
    assert parse_run(rows[0]).options == {"preference": "0.6,0.3,0.1"}
    assert parse_run(rows[1]).options == {"without": "ant,bee", "reads": "input"}
    assert split_methods("mole/reads=input,ant") == ["mole/reads=input", "ant"], "which is no row, and refused as one"


def test_top_k_is_for_methods_that_route_and_set_none():
    texts = ["base", "merged", "expert:a", "oracle_dataset", "arrow", "arrow/top_k=3", "phatgoose/top_p=0.5"]
    assert with_top_k(texts, None) == texts
    assert with_top_k(texts, 2) == [*texts[:4], "arrow/top_k=2", "arrow/top_k=3", "phatgoose/top_p=0.5"]
    assert with_top_k(texts, 1)[-1] == "phatgoose/top_p=0.5/top_k=1"
    assert parse_run(with_top_k(["arrow"], "all")[0]).options == {"top_k": None}
    with pytest.raises(ValueError, match="--top-k 2: of the methods base, merged no one routes"):
        with_top_k(["base", "merged"], 2)


def test_ablation_is_the_papers():
    rows = ablation("glider", 2)
    assert len(rows) == 6 + 2 + 3 and rows[2] == "glider/gamma=0/beta=10" and rows[-1] == "glider/top_k=none/top_p=0.75"
    assert all(parse_run(row) for row in rows + ablation("glider_code", 5))
    with pytest.raises(ValueError, match="got 'arrow'"):
        ablation("arrow", 2)


def test_a_top_k_that_is_given_counts_where_it_is_the_methods_own():
    """Arrow's is four: as its own it would take as many experts as there are."""
    assert with_top_k(["arrow"], 4) == ["arrow"] and parse_runs(["arrow"], ("a", "b"))[0]
    with pytest.raises(ValueError, match="top_k=4 is more than the number of experts, E=2"):
        parse_runs(["arrow"], ("a", "b"), 4)
    assert parse_runs(["arrow"], ("a", "b"), "all")[0]
