"""How right an answer is."""

from __future__ import annotations

import json
import sys

import builders
import pytest
from test_evaluation import make_task

import moerge_ext as moerge
from moerge_ext.evaluation import metrics
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.evaluate import evaluate
from moerge_ext.evaluation.metrics import SCORES, f1
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task


def test_f1_is_squads():
    """Worked by hand: articles, case and punctuation are no words; words count as often as they are said."""
    assert f1("The cat, sat!", "cat sat") == 1 and f1("cat", "dog") == 0 and f1("the", "an") == 1
    assert f1("cat cat dog", "cat dog bird") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert f1("", "cat") == 0 and f1("a big cat", "cat") == pytest.approx(2 / 3)


def test_rouge_is_the_packages():
    pytest.importorskip("rouge_score")
    # the longest common subsequence of 3 of 4 and of 3 words; "sat" and "sits" have stems of their own, plurals not
    assert SCORES["rougeL"]("the cats sat here", "the cat sat") == pytest.approx(2 * 0.75 / 1.75)
    assert SCORES["rouge1"]("b a", "a b") == 1 > SCORES["rougeL"]("b a", "a b") == 0.5
    assert SCORES["rouge2"]("b a", "a b") == 0


def test_a_task_that_asks_for_rouge_gets_it_or_is_refused(tmp_path, monkeypatch):
    folder = make_task(tmp_path, "a", metric="rougeL")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    metrics._scorer.cache_clear()
    with pytest.raises(
        ImportError, match=r'task a: metric .rougeL. needs rouge-score: pip install "moerge_ext\[rouge\]"'
    ):
        load_task(folder)
    monkeypatch.undo()
    pytest.importorskip("rouge_score")
    assert load_task(folder).metric == "rougeL"
    (folder / "test.jsonl").write_text(json.dumps({"input": "a", "target": "猫。"}))
    with pytest.raises(ValueError, match="task a: rougeL reads the letters a to z .* row 0"):
        load_task(folder)


def test_graded_answers_are_scored(tmp_path, monkeypatch):
    model = builders.tiny_llama()
    tokenizer = builders.make_tokenizer(tmp_path)
    folders = builders.random_experts(model, tmp_path / "experts", ["ant"], ["q_proj"])
    task = load_task(make_task(tmp_path, "g", metric="f1", rows=2))
    monkeypatch.setattr(Answerer, "generate", lambda self, prompts, limit: ["ab x", "nothing"])
    (got,) = evaluate(
        model, tokenizer, moerge.load_experts(folders), [parse_run("base")], [task], output=tmp_path / "o"
    )
    assert got.items == pytest.approx((2 / 3, 0), abs=1e-5) and got.value == pytest.approx(1 / 3, abs=1e-5)
