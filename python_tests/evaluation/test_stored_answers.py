"""Stored answers: reused when the same model would give them, by content, and never otherwise."""

from __future__ import annotations

import errno
import json
import multiprocessing
import resource
import shutil
from dataclasses import replace

import builders
import pytest
import torch
from query_cases import described, fake_embedder
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.evaluation import identity
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.inspect_results import best_experts
from moerge_ext.evaluation.judged_answers import judged_answers
from moerge_ext.evaluation.runs import parse_run, parse_runs
from moerge_ext.evaluation.store import alone_in
from moerge_ext.evaluation.tasks import load_task
from moerge_ext.methods import get_method


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
    assert best_experts(results) == {"y": "b"}
    assert best_experts(results[:1]) == {"x": "a"}


def kept(output, name="task"):
    (path,) = (output / "answers" / name).glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_an_answer_is_kept_with_its_question_and_its_shares(ready, tmp_path):
    """Shares in a batch are those of each prompt alone: neither padding nor what comes after an answer's end counts."""
    model, tokenizer, folders, _ = ready
    rows = [{"input": text, "target": "c"} for text in ("a", "abcdefg hij", "xy")]
    (tmp_path / "task" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(tmp_path / "task")
    experts = moerge.load_experts(folders)
    settings = Settings("Q: {input}", batch_size=3, max_new_tokens=9, shares=True)
    with moerge.patch(model, experts, top_k=1):
        ids = model.generate(**tokenizer("Q: a", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    for end in (None, int(ids[0, -2])):  # with an end that one answer has at once
        model.generation_config.eos_token_id = end
        out = tmp_path / f"out{end}"
        evaluate(model, tokenizer, experts, [parse_run("phatgoose/top_k=1")], [task], settings, output=out)
        items = kept(out)
        assert [(i["input"], i["prompt"], i["target"]) for i in items] == [
            (row["input"], f"Q: {row['input']}", "c") for row in rows
        ]
        with moerge.patch(model, experts, top_k=1) as handle:
            for item in items:
                with handle.record() as trace:
                    Answerer(model, tokenizer).generate([item["prompt"]], 9)
                assert list(item["shares"].values()) == pytest.approx(trace.share().tolist(), abs=1e-3)
    settings = Settings(shares=True)
    evaluate(model, tokenizer, experts, [parse_run("expert:ant")], [task], settings, output=tmp_path / "one")
    assert "shares" not in kept(tmp_path / "one")[0], "it does not route"


def test_large_answers_are_compressed_when_complete(ready, tmp_path, monkeypatch):
    monkeypatch.setattr("moerge_ext.evaluation.store.LARGE", 10)
    out = tmp_path / "out"
    assert reused(ready, out) == 0
    (path,) = (out / "answers" / "task").iterdir()
    assert path.name.endswith(".jsonl.gz") and reused(ready, out) == 4
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"jsonl.gz is damaged: .*delete it"):
        reused(ready, out)


def test_all_that_is_damaged_is_named_before_anything_is_asked(ready, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for text in ("base", "expert:ant", "expert:bee"):
        reused(ready, out, text)
    paths = sorted((out / "answers" / "task").iterdir())
    for path in paths[:2]:
        path.write_text("oops")
    monkeypatch.setattr(Answerer, "generate", lambda *_: pytest.fail("an answer was asked for"))
    base, tokenizer, folders, task = ready
    experts = moerge.load_experts(folders)
    runs = [parse_run(text) for text in ("phatgoose", "base", "expert:ant", "expert:bee")]
    with pytest.raises(ValueError) as refused:
        evaluate(base, tokenizer, experts, runs, [task], Settings(max_new_tokens=2), output=out)
    said = str(refused.value)
    assert all(f"{path} is damaged" in said for path in paths[:2]) and str(paths[2]) not in said
    assert sorted((out / "answers" / "task").iterdir()) == paths, "nothing was begun"


def test_a_full_disk_names_the_file_and_keeps_what_was_there(ready, tmp_path):
    """By a limit on the size of files, which holds for root as well."""
    out, settings = tmp_path / "out", {"batch_size": 1}
    reused(ready, tmp_path / "whole", **settings)
    (whole,) = (tmp_path / "whole" / "answers" / "task").iterdir()
    lines = whole.read_text().splitlines(keepends=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sum(map(len, lines[:3])) + 5, before[1]))
    try:
        with pytest.raises(OSError, match=f"{out / 'answers' / 'task' / whole.name}"):
            reused(ready, out, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert reused(ready, out, **settings) in (1, 2) and reused(ready, out, **settings) == 4


def test_answers_that_cannot_be_written_are_no_error(ready, tmp_path, monkeypatch):
    """A read-only store: what is there is used, the rest is said once."""
    out = tmp_path / "out"
    reused(ready, out, "base")

    def refuse(path, _write):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("moerge_ext.evaluation.store.write_atomically", refuse)
    assert reused(ready, out, "base") == 4
    with pytest.warns(UserWarning, match="answers.task cannot be written .*: answers are not stored") as said:
        assert reused(ready, out, "expert:ant") == 0 and reused(ready, out, "expert:ant") == 0
    assert len(said) >= 1


def test_costs_are_counted_and_kept(ready, tmp_path):
    model, tokenizer, folders, task = ready
    experts, out = moerge.load_experts(folders), tmp_path / "out"
    settings = Settings(batch_size=3, max_new_tokens=2)
    model.generation_config.eos_token_id = None
    (score,) = evaluate(model, tokenizer, experts, [parse_run("base")], [task], settings, output=out)
    each = len(tokenizer("a").input_ids)
    assert score.cost.answers == 4 and score.cost.passes == 8 and score.cost.tokens == pytest.approx(4 * (each + 1))
    assert score.cost.seconds > 0 and score.cost.embedded == score.cost.written == 0
    (again,) = evaluate(model, tokenizer, experts, [parse_run("base")], [task], settings, output=out)
    assert again.reused == 4 and again.cost == score.cost
    ranked = load_task(task.folder, metric="exact_match")
    ranked = replace(ranked, metric="rank", choices=tuple("abcd"))
    (score,) = evaluate(model, tokenizer, experts, [parse_run("base")], [ranked], settings)
    assert score.cost.passes == 16
    for folder in folders.values():
        moerge.index_examples(folder, [{"input": "a"}], fake_embedder())
    router = moerge.ExampleRouter(experts, fake_embedder())
    runs = [parse_run("centroid"), parse_run("retrieval_task/queries=2")]
    scores = evaluate(model, tokenizer, experts, runs, [task], settings, routers={"examples": router})
    assert [score.cost.embedded for score in scores] == pytest.approx([4, 2])
    base = moerge.Embedder.from_hidden_states(model, tokenizer, name="tiny")
    for folder in folders.values():
        moerge.index_examples(folder, [{"input": "a"}], base)
    routers = {get_method("dam").router: moerge.ExampleRouter(experts, base)}
    (score,) = evaluate(model, tokenizer, experts, [parse_run("dam")], [task], settings, routers=routers)
    assert score.cost.passes == 8 + 4 and score.cost.embedded == 4


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_other_choices_are_other_answers(tmp_path, ready):
    """Of meta.json, of train.jsonl and of a router's training; what is only said beside them counts for nothing."""
    folder, out = ready[3].folder, tmp_path / "out"

    def asked(**meta):
        (folder / "meta.json").write_text(json.dumps({"metric": "rank", **meta}))
        return reused((*ready[:3], load_task(folder)), out, "expert:ant")

    assert asked(choices=["a", "b", "c", "d"]) == 0 and asked(choices=["a", "b", "c", "d"], split="x") == 4
    assert [reused((*ready[:3], load_task(folder)), out, f"expert:{n}") for n in ("ant", "bee")] == [4, 0]
    assert len(judged_answers(out, [load_task(folder)], ["ant", "bee"]).texts) == 4
    assert asked(choices=["a", "b", "c", "d", "e"]) == 0
    (folder / "meta.json").write_text(json.dumps({"metric": "rank", "choices": ["a", "b", "c", "d", "f"]}))
    with pytest.raises(ValueError, match="ant, task task: no answers to its 4 rows"):
        judged_answers(out, [load_task(folder)], ["ant"])
    lines(folder / "train.jsonl", [{"input": c, "target": c} for c in "abcdx"])
    assert asked() == 0 and asked() == 4
    lines(folder / "train.jsonl", [{"input": c, "target": c} for c in "abcdy"])
    assert asked() == 0


def test_a_tasks_other_files_count_for_who_reads_them(ready, tmp_path):
    """train.jsonl for a router that decides by solved rows, or shows some; the whole file for one that pools inputs."""
    base, tokenizer, folders, task = ready
    out, folder = tmp_path / "out", task.folder
    described(folders)
    for name in folders.values():
        moerge.index_examples(name, [{"input": "a"}], fake_embedder())
    experts = moerge.load_experts(folders)
    writer = moerge.InstructionWriter(lambda prompt: "please do flying", name="spy")
    routers = {
        "examples": moerge.ExampleRouter(experts, fake_embedder()),
        "instruction": moerge.QueryRouter(experts, fake_embedder(), writer, threshold=0.5),
    }
    runs = [parse_run(text) for text in ("base", "centroid", "glider", "glider_code", "retrieval_task/queries=9")]

    def asked(similar):
        settings = Settings(max_new_tokens=1, similar=similar)
        options = {"routers": routers, "output": out, "progress": False}
        scores = evaluate(base, tokenizer, experts, runs, [load_task(folder, limit=2)], settings, **options)
        return [score.reused for score in scores]

    train = [{"input": f"x{i}", "target": "y"} for i in range(5)]
    lines(folder / "train.jsonl", train)
    assert asked(2) == [0] * 5 and asked(2) == [2] * 5
    lines(folder / "train.jsonl", [*train[:4], {"input": "x4", "target": "z"}])
    assert asked(2) == [2, 2, 0, 0, 2]
    with open(folder / "test.jsonl", "a") as file:
        file.write('{"input": "e", "target": "e"}\n')
    assert asked(2) == [2, 2, 2, 2, 0]
