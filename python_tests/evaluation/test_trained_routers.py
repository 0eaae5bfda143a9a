"""Rows with trained routers in an evaluation; RAMoLE, which asks for the query's text as well."""

from __future__ import annotations

import json
from dataclasses import replace

import builders
import patch_cases as cases
import pytest
from builders import make_tokenizer
from query_cases import WORDS, fake_embedder

import moerge_ext as moerge
from moerge_ext.evaluation.evaluate import evaluate
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task


def test_ramole_with_one_expert_answers_as_retrieval_does(tmp_path):
    """Of one retrieved expert the weight is 1, whatever its router learned; of two it is not."""
    model = cases.build("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer(tmp_path / "model")
    folders = builders.random_experts(model, tmp_path / "experts", cases.NAMES, cases.DECODER)
    embedder = fake_embedder()
    for name, folder in folders.items():
        moerge.index_examples(
            folder, [{"input": f"please do {WORDS[name]} {i}", "target": "x"} for i in "ab"], embedder
        )
    task = tmp_path / "task"
    task.mkdir()
    rows = [{"input": f"please do {word}", "target": "ab"} for word in WORDS.values()]
    for split in ("train", "test"):
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "meta.json").write_text(json.dumps({"task": "t", "split": "train", "metric": "exact_match"}))

    experts = moerge.load_experts(folders)
    result = moerge.train_routers(
        model, experts, rows, tmp_path / "r", method="ramole", tokenizer=tokenizer, steps=4, lr=0.1, progress=False
    )
    trained = {"routers": moerge.read_routers(result.path)}
    runs = [parse_run("retrieval")]
    runs += [replace(run, options=run.options | trained) for run in map(parse_run, ("ramole/keep=1", "ramole/keep=2"))]
    routers = {"examples": moerge.ExampleRouter(experts, embedder)}
    common = {"routers": routers, "output": tmp_path / "out", "progress": False}
    evaluate(model, tokenizer, experts, runs, [load_task(task)], **common)
    answers = {}
    for file in (tmp_path / "out" / "answers" / "t").glob("*.jsonl"):
        settings, *items = map(json.loads, file.read_text().splitlines())
        answers[settings["settings"]["run"]] = [item["answer"] for item in items]
    assert answers["ramole/keep=1"] == answers["retrieval"] and len(set(answers["retrieval"])) > 1
    assert answers["ramole/keep=2"] != answers["retrieval"]
    with pytest.raises(ValueError, match="it needs a router by examples"):
        evaluate(model, tokenizer, experts, runs[1:], [load_task(task)], progress=False)
    with pytest.raises(ValueError, match="needs routers that were trained"):
        evaluate(model, tokenizer, experts, [parse_run("ramole")], [load_task(task)], **common)
