"""Tasks whose choices are no set of answers, and texts that nobody can route by: refused before the first answer."""

from __future__ import annotations

import json
import re

import builders
import patch_cases as cases
import pytest
from query_cases import described, fake_embedder

import moerge_ext as moerge
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_choices_are_different_texts(tmp_path):
    """Each counts once; ARC's form is read; what is no set of answers has no chance, and cannot be ranked."""
    folder = tmp_path / "a"

    def chance(*choices, metric="exact_match", meta=None, target="yes"):
        write(folder / "test.jsonl", [{"input": "q", "target": target, "choices": said} for said in choices])
        (folder / "meta.json").write_text(json.dumps({"metric": metric, **(meta or {})}))
        return load_task(folder).chance

    arc = {"text": ["yes", "no", "a", "b"], "label": ["A", "B", "C", "D"]}
    wrong = ("A) yes B) no", 3, ["yes", 3], ["yes", None], ["yes"], ["yes", "yes"], {"label": ["yes", "no"]})
    both = {"choices": ["yes", "no"]}
    for metric in ("exact_match", "rank"):
        assert chance(arc, metric=metric) == 0.25 and chance(["yes", "yes", "no"], metric=metric) == 0.5
        assert chance(None, metric=metric, meta=both) == 0.5
    assert chance(None) is None and chance(None, meta={"choices": ["yes", "yes"]}) is None
    for said in wrong:
        assert chance(arc, said) is None and chance(arc, said, meta=both) is None
        with pytest.raises(ValueError, match=r"task a: .* two different texts .*; row 1 \(from 0\) has others"):
            chance(arc, said, metric="rank", meta=both)
    with pytest.raises(ValueError, match=r"rows 0, 1 \(from 0\) have others, the first has target 'A' and choices"):
        chance(arc, arc, metric="rank", target="A")


def test_a_blank_text_is_named_before_the_first_answer(tmp_path, monkeypatch):
    """Of the rows, of the whole file where its inputs are pooled, of train.jsonl where that is embedded."""
    model, tokenizer = cases.build("llama"), builders.make_tokenizer(tmp_path / "tokenizer")
    folders = builders.random_experts(model, tmp_path / "experts", ["ant", "bee"], ["q_proj"])
    monkeypatch.setattr(Answerer, "generate", lambda self, prompts, limit: ["x"] * len(prompts))
    folder, gap = tmp_path / "gap", {"input": " ", "target": "f"}
    write(folder / "test.jsonl", [*[{"input": c, "target": c} for c in "ab"], gap])
    write(folder / "train.jsonl", [*[{"input": c, "target": c} for c in "abcd"], gap])
    for expert in folders.values():
        moerge.index_examples(expert, [{"input": "a"}], fake_embedder())
    experts = described(folders)
    routers = {
        "examples": moerge.ExampleRouter(experts, fake_embedder()),
        "instruction": moerge.QueryRouter(experts, fake_embedder(), threshold=0.5),
    }

    def asked(*texts, limit=None):
        runs, task = [parse_run(text) for text in ("base", *texts)], load_task(folder, limit=limit)
        evaluate(model, tokenizer, experts, runs, [task], Settings(max_new_tokens=1), routers=routers, progress=False)

    asked("phatgoose")
    asked("centroid", "glider", limit=2)
    for texts, limit, where in (
        (["centroid", "glider"], None, "test.jsonl, row 2 (from 0): the input is blank, and centroid, glider cannot"),
        (
            ["retrieval_task/queries=9"],
            2,
            "test.jsonl, row 2 (from 0): the input is blank, and retrieval_task/queries=9",
        ),
        (["glider_code"], 2, "train.jsonl, row 4 (from 0): the input is blank, and glider_code cannot"),
    ):
        with pytest.raises(ValueError, match=f"words, or leave its row out\ntask gap: {re.escape(where)}"):
            asked(*texts, limit=limit)
    write(folder / "train.jsonl", [gap])
    with pytest.raises(ValueError, match="task gap: method 'glider_code' reads 3 solved examples, and its .* has 1"):
        asked("glider_code")
