"""What a command has made is not replaced without a word."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import (
    llama,
    one_thread,  # noqa: F401 (used by being here)
)
from query_cases import fake_embedder

from moerge_ext.commands import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    random_experts(model, tmp_path, ["a", "b"], ["q_proj"])
    for task in ("one", "two"):
        (tmp_path / task).mkdir()
        rows = [{"input": f"copy {c}:", "target": c} for c in "abcdef"]
        (tmp_path / task / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_model(*_args, **_kwargs):
    pytest.fail("the model was read")


def run(words: str) -> int:
    return cli.main(words.split())


TRAINING = "--data one/test.jsonl --device cpu --no-progress --steps 1"
WAY_OUT = "is there already: pass --overwrite to replace it, or name another folder (--output)"


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (f"train-expert model {TRAINING} --output e --rank 2", "e/adapter_model.safetensors"),
        ("new-expert model --output e --rank 2 --no-progress", "e/adapter_model.safetensors"),
        (f"train-gates model a {TRAINING} --output g", "g/moerge_gates.safetensors"),
        ("train-gates model a --data one/test.jsonl --kind average-activation --output g --no-progress",
         "g/moerge_gates.safetensors"),
        (f"train-gates model a {TRAINING} --output g --joint", "g/moerge_gates.safetensors"),
        (f"train-routers model --experts a b --method meteora {TRAINING} --output r", "r/moerge_routers.safetensors"),
        ("describe --adapter a --instruction x --embedder none --output d", "d/moerge_gates.safetensors"),
        ("train-query-router tfidf --experts a b --data a=one/test.jsonl --data b=two/test.jsonl --output q",
         "q/moerge_text_router.safetensors"),
    ],
)  # fmt: skip
def test_a_finished_result_is_refused_before_a_model_is_read(folder, words, file, capsys, monkeypatch):
    monkeypatch.setattr("moerge_ext.commands.describe.build_embedder", lambda *_: fake_embedder())
    pytest.importorskip("peft")
    pytest.importorskip("sklearn")
    assert run(words) == 0
    before = (folder / file).stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
        patched.setattr("moerge_ext.commands.describe.build_embedder", no_model)
        assert run(words) == 2
    assert f"{file} {WAY_OUT}" in capsys.readouterr().err
    if "--steps" in words:
        assert run(f"{words} --resume") == 0 and "finished before, in 1 step:" in capsys.readouterr().out
        assert run(f"{words} --resume --seed 9") == 2
        assert "is there already, of other settings (seed: saved with 0, now 9): pass" in capsys.readouterr().err
    assert (folder / file).stat().st_mtime_ns == before
    assert run(f"{words} --overwrite") == 0 and (folder / file).stat().st_mtime_ns > before


def test_joint_training_spares_another_expert(folder, capsys):
    assert run(f"train-gates model a {TRAINING} --output b --joint") == 2
    assert "is there already" in capsys.readouterr().err


def test_a_whole_model_is_never_replaced(folder, capsys, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
    for words in (f"train-mix model {TRAINING} --output model", f"train-calm model model {TRAINING} --output model"):
        assert run(words) == 2
        assert "model/config.json is there already: name another folder (--output)" in capsys.readouterr().err


EVAL = "eval --model model --experts a b --no-progress --output out --tasks"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("two --methods arrow,base", "--tasks: one there, two here"),
        ("one --methods arrow", "--methods: 'base,arrow' there, 'arrow' here"),
        ("one --methods base,arrow --limit 2", "--limit: 3 there, 2 here"),
        ("one --methods base,arrow --limit 3 --template x{input}", "--template: '{input}' there, 'x{input}' here"),
    ],
)
def test_results_of_other_arguments_are_refused(folder, more, said, capsys, monkeypatch):
    assert run(f"{EVAL} one --methods base,arrow --limit 3") == 0
    before = (folder / "out" / "results.json").read_bytes()
    more += "" if "--limit" in more else " --limit 3"
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoModelForCausalLM.from_pretrained", no_model)
        assert run(f"{EVAL} {more}") == 2
    told = capsys.readouterr().err
    assert f"out/results.json is there already, of other arguments ({said}): pass --overwrite" in told
    assert (folder / "out" / "results.json").read_bytes() == before
    assert run(f"{EVAL} {more} --overwrite") == 0


def test_results_grow_and_are_made_again(folder, capsys):
    assert run(f"{EVAL} one --methods base") == 0
    assert run(f"{EVAL} one two --methods arrow,base,oracle_dataset --batch-size 2 --top-k 1") == 2
    assert "--top-k: not given there, 1 here" in capsys.readouterr().err
    assert run(f"{EVAL} one two --methods arrow,base,oracle_dataset --batch-size 2") == 0
    out = capsys.readouterr().out
    assert out.startswith("oracle_dataset: made of the answers of every expert alone, so 2 more rows are evaluated")
    rows = json.loads((folder / "out" / "results.json").read_text())
    assert len(rows) == 2 * 5 and "6 stored answers reused" in out
    (folder / "out" / "asked.eval.json").unlink()
    assert run(f"{EVAL} one two --methods arrow,base,oracle_dataset") == 2
    assert "of arguments that are not known" in capsys.readouterr().err


def test_results_of_arguments_that_mean_the_same(folder, tmp_path_factory, monkeypatch, capsys):
    """However paths are typed, with what is the default anyway, and where all was moved; not from another folder."""
    assert run(f"{EVAL} one --methods base,arrow") == 0
    here, again = folder.resolve(), "--methods arrow,base --no-progress --output"
    (folder / "link").symlink_to(folder / "a")
    for words in (
        f"--model {here}/model --experts ./a/ {here}/b --tasks {here}/one {again} out",
        f"--model model/../model --experts link b --names link b --tasks one {again} {here}/out",
        f"--model model --experts a b --tasks one --top-k 4 {again} {here}/out",
        f"--model model --experts a b --tasks one --base-name {here.name} --split test --writer-timeout 9 {again} out",
    ):
        fits = "link" not in words and "--top-k" not in words
        assert run(f"eval {words}") == (0 if fits else 2), words
        told = capsys.readouterr()
        assert ("4 stored answers reused" in told.out) == fits or "2 stored" in told.out, told
    moved = tmp_path_factory.mktemp("moved") / "all"
    folder.rename(moved)
    monkeypatch.chdir(moved)
    assert run(f"{EVAL} one --methods base,arrow") == 0, "all of it was moved"
    (moved / "sub").mkdir()
    for name in ("model", "a", "b", "one"):
        (moved / "sub" / name).mkdir()
    monkeypatch.chdir(moved / "sub")
    (moved / "sub" / "one" / "test.jsonl").write_text('{"input": "x", "target": "y"}')
    capsys.readouterr()
    assert run(f"{EVAL.replace(' out ', ' ../out ')} one --methods base,arrow") == 2
    assert f"--model: '{moved}/model' there, '{moved}/sub/model' here" in capsys.readouterr().err


def test_inspections(folder, capsys):
    pytest.importorskip("matplotlib")
    words = "inspect --model model --experts a b --no-progress --output seen --limit 2 --oracle one=a two=b --tasks one"
    with pytest.warns(UserWarning, match="--oracle: no task is called two; nothing is measured there"):
        assert run(f"{words} --methods arrow") == 0
    out = capsys.readouterr().out
    assert "no oracle" not in out and "Pearson" not in out
    assert "no scores: --results FILE, the results.json of `moerge eval` on these tasks, brings them" in out
    assert run(f"{words} two --methods arrow") == 0
    before = (folder / "seen" / "inspect.json").read_bytes()
    bare = words.replace("one=a two=b", "one=b two=b")
    assert run(f"{bare} two --methods arrow") == 2 and (folder / "seen" / "inspect.json").read_bytes() == before
    assert "inspect.json is there already, of other arguments (--oracle:" in capsys.readouterr().err
    assert run(f"{words.replace('one=a two=b', 'one=a').replace('seen', 'fewer')} two --methods arrow") == 0
    assert run(f"{words.replace('seen', 'fewer')} two --methods arrow") == 0, "an oracle more"
    assert run(f"{words} --methods arrow") == 2
    assert "seen/inspect.json is there already, of other arguments (--tasks:" in capsys.readouterr().err
    assert run(f"{EVAL.replace(' out ', ' seen ')} one --methods arrow") == 0
    capsys.readouterr()
    assert run(f"{words.partition(' --oracle')[0].replace('seen', 'bare')} --tasks one --methods arrow") == 0
    assert "no oracle, nor what is measured against it: --oracle TASK=EXPERT" in capsys.readouterr().out
    known = f"{words.replace(' seen ', ' known ')} two --methods arrow --results seen/results.json"
    assert run(known) == 0
    out = capsys.readouterr().out
    assert "no score of arrow on two: seen/results.json has no such rows" in out
    assert "correlation of KL and score over tasks: -" in out and "no correlation: it takes at least three tasks" in out
    assert run(f"{words} two --methods arrow") == 0, "what `eval` asked for is noted apart"
    bare = f"{words.partition(' --oracle')[0].replace('seen', 'bare')} --tasks one --methods arrow"
    for more in (" --oracle one=a", " --oracle one=a --results seen/results.json"):
        assert run(bare + more) == 0, "what it said would bring more"
    assert run(f"{bare} --oracle one=b --results seen/results.json") == 2
