"""Stored answers: reused when the same model would give them, by content, and never otherwise."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import builders
import pytest
import torch
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.evaluation import identity
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.inspect_results import best_experts
from moerge_ext.evaluation.runs import parse_runs
from moerge_ext.evaluation.store import alone_in
from moerge_ext.evaluation.tasks import load_task


@pytest.fixture
def ready(tmp_path):
    """(model, tokenizer, {name: folder}, task)."""
    model = builders.tiny_llama()
    tokenizer = builders.make_tokenizer(tmp_path / "tokenizer")
    folders = builders.random_experts(model, tmp_path / "experts", ["ant", "bee"], ["q_proj"])
    task = tmp_path / "task"
    task.mkdir()
    (task / "test.jsonl").write_text("".join(json.dumps({"input": c, "target": c}) + "\n" for c in "abcd"))
    (task / "meta.json").write_text(json.dumps({"metric": "exact_match"}))
    return model, tokenizer, folders, load_task(task)


def reused(ready, output, text="expert:ant", *, names=("ant", "bee"), model=None, tokenizer=None, **settings):
    """How many answers of one run are taken from `output`."""
    base, theirs, folders, task = ready
    experts = moerge.load_experts({name: folders[name] for name in names})
    runs, _ = parse_runs([text], experts.names)
    options = {"settings": Settings(max_new_tokens=2, **settings), "output": output, "progress": False}
    return evaluate(model or base, tokenizer or theirs, experts, runs, [task], **options)[0].reused


def rewrite(folder, change):
    """An expert trained again at the same path."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_the_same_content_is_reused(ready, tmp_path):
    """Wherever it lies, in whatever order, beside whatever else."""
    folders = ready[2]
    out = tmp_path / "out"
    assert reused(ready, out) == 0 and reused(ready, out) == 4
    assert reused(ready, out, names=("bee", "ant")) == 4
    assert reused(ready, out, names=("ant",)) == 4
    shutil.copytree(folders["ant"], tmp_path / "elsewhere" / "ant")
    folders["ant"] = tmp_path / "elsewhere" / "ant"
    assert reused(ready, out) == 4
    rewrite(folders["bee"], lambda tensors: next(iter(tensors.values())).add_(1))
    assert reused(ready, out) == 4, "expert:ant does not depend on bee"
    assert reused(ready, out, "base") == 0 and reused(ready, out, "base", names=("ant",)) == 4


def test_other_content_is_not(ready, tmp_path):
    """Retrained experts, other gates, another tokenizer, a changed base, another type: each is asked again."""
    model, _, folders, _ = ready
    out = tmp_path / "out"
    assert reused(ready, out, "phatgoose") == 0
    rewrite(folders["bee"], lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1))
    assert reused(ready, out, "phatgoose") == 0
    gates = folders["ant"] / "moerge_gates.safetensors"
    metadata = {"format": "moerge-gates", "version": "1", "kind": "sigmoid-gate"}
    save_file({name: -gate for name, gate in load_file(gates).items()}, gates, metadata)
    assert reused(ready, out, "phatgoose") == 0 and reused(ready, out, "phatgoose") == 4
    assert reused(ready, out, "phatgoose", template="Q: {input}") == 0
    other = builders.make_tokenizer(tmp_path / "other")
    other.add_special_tokens({"additional_special_tokens": ["<x>"]})
    assert reused(ready, out, "phatgoose", tokenizer=other) == 0
    with torch.no_grad():
        model.lm_head.weight.view(-1)[0] += 1
    assert reused(ready, out, "phatgoose") == 0
    assert reused(ready, out, "phatgoose", model=model.to(torch.float64)) == 0
    assert reused(ready, out, "phatgoose") == 4


def test_digests_see_names_types_and_every_byte():
    a = torch.arange(6.0)
    assert identity.of_tensors([("a", a), ("b", a)]) == identity.of_tensors([("b", a), ("a", a)])
    seen = [[("a", a)], [("b", a)], [("a", a.int())], [("a", a.view(2, 3))], [("a", a + torch.eye(6)[5] * 1e-6)], []]
    assert len({identity.of_tensors(tensors) for tensors in seen}) == len(seen)
    strided = torch.stack([a, a], 1)[:, 0]
    assert identity.of_tensors([("a", strided)]) == identity.of_tensors([("a", a)])


def _hold(folder, begun, done):
    with alone_in(folder):
        begun.set()
        done.wait(60)


def test_one_evaluation_at_a_time(ready, tmp_path):
    """Two in one folder would write more answers than there are rows."""
    context = multiprocessing.get_context("fork")
    begun, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "out", begun, done))
    other.start()
    try:
        assert begun.wait(60)
        with pytest.raises(ValueError, match="another evaluation is writing into .*out: wait"):
            reused(ready, tmp_path / "out")
    finally:
        done.set()
        other.join(60)
    assert reused(ready, tmp_path / "out") == 0


def test_no_oracle_where_all_experts_score_the_same():
    rows = [("a", "x", 0.5), ("b", "x", 0.5), ("a", "y", 0.1), ("b", "y", 0.2)]
    results = [{"method": f"expert:{expert}", "task": task, "score": score} for expert, task, score in rows]
    assert best_experts(results) == {"x": None, "y": "b"}
    assert best_experts(results[:1]) == {"x": "a"}
