"""Tasks, answers, metrics and `moerge eval`."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import builders
import patch_cases as cases
import pytest
import torch
from builders import make_tokenizer
from query_cases import described, fake_embedder

import moerge_ext as moerge
import moerge_ext.evaluation.evaluate
from moerge_ext.commands import main as cli
from moerge_ext.evaluation.answers import Answerer
from moerge_ext.evaluation.evaluate import Settings, evaluate
from moerge_ext.evaluation.metrics import accuracy, exact_match
from moerge_ext.evaluation.runs import parse_run, parse_runs
from moerge_ext.evaluation.scores import Score, derive
from moerge_ext.evaluation.tasks import load_task
from moerge_ext.queries import calibration
from moerge_ext.training.lorahub import LoraHubRouter

TARGETS = ("ab", "cde", "f")


def make_task(root, name, part="train", metric="exact_match", rows=7, **meta):
    folder = root / name
    folder.mkdir(parents=True)
    for split, count in (("train", 6), ("validation", 4), ("test", rows)):
        lines = [{"input": f"{name} {'xyz'[i % 3] * (i + 1)}", "target": TARGETS[i % 3]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "meta.json").write_text(json.dumps({"task": name, "split": part, "metric": metric, **meta}))
    return folder


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A tiny Llama with a tokenizer of letters, three described experts, three tasks; all on disk."""
    root = tmp_path_factory.mktemp("eval")
    model = cases.build("llama")
    model.save_pretrained(root / "model")
    tokenizer = make_tokenizer(root / "model")
    folders = builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER)
    described(folders)
    tasks = [
        make_task(root, "ant"),
        make_task(root, "bee", metric="rank"),
        make_task(root, "new", "heldout", "accuracy"),
    ]
    return root, model, tokenizer, folders, tasks


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_right_answers():
    assert exact_match(" A b ", "A b") and not exact_match("a b", "A b")
    assert accuracy("Yes.", "yes") and not accuracy("yes it is", "yes")


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_know_choices_and_chance(tmp_path):
    task = load_task(make_task(tmp_path, "a", metric="rank"), limit=4)
    assert task.choices == ("ab", "cde", "f") and task.chance == pytest.approx(1 / 3) and len(task.rows) == 4
    folder = make_task(tmp_path, "b")
    assert load_task(folder).choices is None and load_task(folder).chance is None  # it may write anything
    assert load_task(make_task(tmp_path, "c", choices=["a", "b"])).chance == 0.5
    (folder / "test.jsonl").write_text('{"input": "q", "target": "unseen"}\n')
    with pytest.raises(ValueError, match="rank classification needs the choices of every row"):
        load_task(folder, metric="rank")
    (folder / "test.jsonl").write_text('{"input": "q", "target": "b", "choices": ["a", "b"]}\n')
    assert load_task(folder, metric="rank").chance == 0.5


def test_tasks_explain_what_is_wrong(tmp_path):
    for metric in ("bleu", ["rougeL"], {"name": "rougeL"}):
        folder = make_task(tmp_path / str(metric)[:3], "a", metric=metric)
        with pytest.raises(ValueError, match="task a: metric must be one of .*got .*; pass --metric"):
            load_task(folder)
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        load_task(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"a task is a folder that holds test.jsonl, got the file .*: pass its folder"):
        load_task(folder / "meta.json")
    with pytest.raises(ValueError, match=f"test.jsonl: pass {re.escape(str(folder))}$"):
        load_task(folder / "test.jsonl")
    (folder / "test.jsonl").write_text('{"input": "q"}\nnonsense\n')
    with pytest.raises(ValueError, match=r"line 1: expected(.|\n)*line 2: not JSON"):
        load_task(folder)
    (folder / "test.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rows"):
        load_task(folder)
    (folder / "test.jsonl").write_bytes(b"\x80\xfe")
    with pytest.raises(ValueError, match="test.jsonl is not UTF-8 text"):
        load_task(folder)
    (folder / "test.jsonl").write_text('{"input": "q", "target": "b", "choices": "ab"}')
    with pytest.raises(ValueError, match="needs the choices of every row"):
        load_task(folder, metric="rank")
    for meta, text in (
        ("{oops", "meta.json is not JSON"),
        ("[]", "must hold an object"),
        ('{"choices": 3}', "choices"),
    ):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(ValueError, match=text):
            load_task(folder)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_batch_answers_as_one_by_one(family, tmp_path):
    model = cases.build(family)
    asked = Answerer(model, make_tokenizer(tmp_path))
    prompts, answers = ["abc", "a", "hello there"], ["de", "xyz uvw", "f"]
    together = asked.log_likelihoods(prompts, answers, length_norm=False)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start, end = asked.prompt_ids(prompt), asked.target_ids(answer)
        if family == "t5":
            out = model(input_ids=torch.tensor([start]), labels=torch.tensor([end])).logits[0]
        else:
            out = model(input_ids=torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        want = out.detach().double().log_softmax(-1)[range(len(end)), end].sum()
        torch.testing.assert_close(together[i], want, rtol=1e-4, atol=1e-4)
        alone = asked.log_likelihoods([prompt], [answer], length_norm=True)
        torch.testing.assert_close(alone[0], want / len(end), rtol=1e-4, atol=1e-4)
    assert asked.generate(prompts, 6) == [asked.generate([prompt], 6)[0] for prompt in prompts]


def test_a_prompt_beyond_the_context_is_refused(setup):
    _, model, tokenizer, _, _ = setup
    with pytest.raises(ValueError, match=r"has 13\d tokens, more than the context of 128: shorten"):
        Answerer(model, tokenizer).generate(["a" * 120], 12)
    with pytest.raises(ValueError, match="more than the context of 128"):
        Answerer(model, tokenizer).log_likelihoods(["a" * 120], ["b" * 10], length_norm=True)


# ---- evaluate --------------------------------------------------------------------------------------------------------


def score(method, task, right, n=10, part="train"):
    return Score(method, task, part, "exact_match", n, right, 0.5, tuple(i < right for i in range(n)))


def test_evaluate_goes_on_where_it_stopped(setup, tmp_path, monkeypatch):
    _, model, tokenizer, folders, tasks = setup
    experts, loaded = moerge.load_experts(folders), [load_task(task) for task in tasks]
    runs, _ = parse_runs(["base", "phatgoose", "expert:ant"], experts.names)
    options = {"settings": Settings(batch_size=3, max_new_tokens=3), "progress": False, "output": tmp_path}
    first = evaluate(model, tokenizer, experts, runs, loaded, **options)
    assert [(s.method, s.task, s.n) for s in first] == [(r.label, t.name, 7) for r in runs for t in loaded]
    assert not any(isinstance(m, moerge.RoutedLinear) for m in model.modules())
    again = evaluate(model, tokenizer, experts, runs, loaded, **{**options, "output": None})
    assert again == first
    path = next((tmp_path / "answers" / "ant").glob("phatgoose.*.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:9])  # killed in the middle of a line
    asked = []
    real = Answerer.generate
    monkeypatch.setattr(Answerer, "generate", lambda self, p, limit: asked.append(len(p)) or real(self, p, limit))
    assert evaluate(model, tokenizer, experts, runs, loaded, **options) == first
    assert asked == [3, 1]
    kept = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [line | {"cost": 0} for line in kept] == [json.loads(line) | {"cost": 0} for line in lines[1:]]
    path.write_text("".join(lines[:3]) + lines[4])
    with pytest.raises(ValueError, match="is damaged: .*delete it"):
        evaluate(model, tokenizer, experts, runs, loaded, **options)


def test_a_run_patches_once(setup, monkeypatch):
    _, model, tokenizer, folders, tasks = setup
    patched = []
    real = moerge_ext.evaluation.evaluate.patch
    monkeypatch.setattr(
        "moerge_ext.evaluation.evaluate.patch", lambda *args, **kw: patched.append(args[2]) or real(*args, **kw)
    )
    runs = [parse_run(text) for text in ("base", "arrow/top_k=2", "expert:ant", "phatgoose")]
    options = {"settings": Settings(max_new_tokens=1), "progress": False}
    evaluate(model, tokenizer, moerge.load_experts(folders), runs, [load_task(tasks[0], limit=1)], **options)
    assert patched == ["arrow", "expert:ant", "phatgoose"]


def test_task_level_routers_read_inputs_or_solved_rows(setup, monkeypatch):
    """Which rows decide: inputs of the evaluated file for retrieval, solved training rows for LoraHub."""
    pytest.importorskip("nevergrad")
    _, model, tokenizer, folders, tasks = setup
    task = load_task(tasks[0], limit=2)
    for folder in folders.values():
        moerge.index_examples(folder, task.examples(), fake_embedder())
    experts, seen, solved = moerge.load_experts(folders), [], []
    router = moerge.ExampleRouter(experts, fake_embedder())
    real = router.embedder.embed
    router.embedder.embed = lambda texts: seen.append(texts) or real(texts)
    hub = LoraHubRouter(tokenizer, "Q: {input}")
    search = hub.task_affinities
    monkeypatch.setattr(hub, "task_affinities", lambda rows, handle: solved.append(rows) or search(rows, handle))
    runs = [parse_run("retrieval_task/queries=5"), parse_run("adapter_soup"), parse_run("lorahub/budget=3/count=2")]
    settings = Settings("Q: {input}", batch_size=1, max_new_tokens=1)
    scores = evaluate(
        model, tokenizer, experts, runs, [task], settings, routers={"examples": router, "few-shot": hub}, progress=False
    )
    assert [score.n for score in scores] == [2, 2, 2]
    assert [len(texts) for texts in seen] == [5, 7] and {t for texts in seen for t in texts} <= set(task.inputs())
    assert [len(rows) for rows in solved] == [5] and all(row in task.examples() for row in solved[0])
    for text in ("lorahub/budget=0", "lorahub/optimizer=adam"):
        with pytest.raises(ValueError, match="lorahub: (budget must be positive|optimizer must be one of)"):
            evaluate(model, tokenizer, experts, [parse_run(text)], [task], settings, routers={"few-shot": hub})


def test_rank_classification(setup):
    _, model, tokenizer, folders, tasks = setup
    task = load_task(tasks[1])
    run = [parse_run("base")]
    asked = Answerer(model, tokenizer)
    for norm in (True, False):
        (got,) = evaluate(model, tokenizer, moerge.load_experts(folders), run, [task], Settings(length_norm=norm))
        for row, right in zip(task.rows, got.items, strict=True):
            values = asked.log_likelihoods([row["input"]] * 3, TARGETS, length_norm=norm)
            assert right == (TARGETS[int(values.argmax())] == row["target"])


def test_evaluate_refuses_before_the_first_answer(setup, monkeypatch):
    _, model, tokenizer, folders, tasks = setup
    experts, task = moerge.load_experts(folders), load_task(tasks[0])
    monkeypatch.setattr(Answerer, "generate", lambda *_: pytest.fail("an answer was asked for"))
    for runs, loaded, text in (
        (["base", "glider_code"], [task], "needs a router by instruction"),
        (["base", "average_activation"], [task], "expected a gate of kind"),
        ([], [task], "at least one method"),
        (["base"], [task, task], "distinct names; several are called ant"),
    ):
        with pytest.raises(ValueError, match=text):
            evaluate(model, tokenizer, experts, [parse_run(r) for r in runs], loaded)
        assert not any(isinstance(m, moerge.RoutedLinear) for m in model.modules())
    for wrong in ({"template": "x"}, {"batch_size": 0}, {"max_new_tokens": 0}, {"similar": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Settings(**wrong)


def test_derived_baselines():
    scores = [
        score("expert:a", "s", 9),
        score("expert:a", "t", 1),
        score("expert:b", "s", 2),
        score("expert:b", "t", 7),
    ]
    made = {(s.method, s.task): s.right for s in derive(scores, ["oracle_dataset", "best_individual"])}
    assert made == {
        ("oracle_dataset", "s"): 9,
        ("oracle_dataset", "t"): 7,
        ("best_individual", "s"): 9,
        ("best_individual", "t"): 1,
    }


def command(setup, tmp_path, *more):
    root, _, _, folders, tasks = setup
    words = ["eval", "--overwrite", "--model", root / "model", "--experts", *folders.values(), "--tasks", *tasks]
    return cli.main(
        [str(w) for w in [*words, "--output", tmp_path / "out", "--no-progress", "--max-new-tokens", 3, *more]]
    )


def test_eval_command(setup, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    multitask = ["--multitask", setup[3]["cat"], "--cost", "--shares"]
    assert command(setup, tmp_path, "--methods", "base,phatgoose,oracle_dataset", *multitask) == 0
    out = capsys.readouterr().out
    assert "cost per answer" in out and "tokens/s" in out
    assert "oracle_dataset" in out and "chosen on that set" in out and "chance" in out  # of the task by rank
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {row["method"] for row in rows} == {
        "base",
        "phatgoose",
        *(f"expert:{n}" for n in cases.NAMES),
        "oracle_dataset",
        "multitask",
    }
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == len(rows) == 21
    assert (tmp_path / "out" / "results.md").read_text().startswith("|  | mean held-in (n=14) | mean held-out (n=7) |")
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000


def test_top_k_from_the_shell(setup, tmp_path, capsys):
    """Arrow's own top_k is four, and there are three experts."""
    more = ["--methods", "base,arrow", "--limit", 1]
    with pytest.warns(UserWarning, match="'arrow' takes the top 4 by itself; there are 3 experts, all of which"):
        assert command(setup, tmp_path, *more) == 0
    for given in (5, 4):  # also where it is the method's own
        assert command(setup, tmp_path, *more, "--top-k", given) == 2
        assert f"top_k={given} is more than the number of experts, E=3" in capsys.readouterr().err
    assert command(setup, tmp_path, *more, "--top-k", 2) == 0
    assert "arrow/top_k=2" in capsys.readouterr().out


def test_the_base_indexes_and_routes_from_the_shell(setup, tmp_path, monkeypatch, capsys):
    root, _, _, folders, tasks = setup
    for name, folder in folders.items():
        words = ["--adapter", folder, "--examples", tasks[0] / "train.jsonl", "--index", 3]
        words += ["--embedder", root / "model", "--embedder-name", "tiny", "--hidden-layer", -1]
        assert cli.main(["describe", *map(str, words)]) == 0, capsys.readouterr().err
        moerge.index_examples(folder, [{"input": name}], fake_embedder())
    monkeypatch.setattr("moerge_ext.commands.options.build_embedder", lambda *_: fake_embedder())
    assert "moerge_examples.tiny_hidden_state_-1.safetensors" in capsys.readouterr().out
    assert command(setup, tmp_path, "--methods", "dam", "--base-name", "tiny") == 2
    assert "indexed only by bag, tiny_hidden_state_-1" in capsys.readouterr().err
    more = ["--methods", "dam,token_level", "--embedder", "bag", "--base-name", "tiny"]
    more += ["--hidden-layer", "-1", "--limit", 2]
    assert command(setup, tmp_path, *more) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(rows) == 6 and {row["method"] for row in rows} == {"dam", "token_level"}


def test_ablation_is_one_command(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerge_ext.commands.options.build_embedder", lambda *_: fake_embedder())
    tasks = setup[4]
    drawn = {}
    real = calibration.Calibration.plot
    monkeypatch.setattr(
        calibration.Calibration, "plot", lambda self, path: drawn.update(vars(self)) or real(self, path)
    )
    more = ["--embedder", "bag", "--ablation", "glider", "--calibrate", tasks[0], "--limit", 2]
    assert command(setup, tmp_path, *more) == 0
    assert "threshold" in capsys.readouterr().out and (tmp_path / "out" / "threshold.png").is_file()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert drawn["held_in"]["ant"].shape == (4, 3) and drawn["held_out"]["new"].shape == (2, 3)
    labels = [row["method"] for row in rows if row["task"] == "ant"]
    assert len(labels) == 12 and "glider/gamma=0/beta=3000 (no writer)" in labels


def test_glider_is_zero_shot_unless_it_sees_similar_examples(setup):
    _, model, tokenizer, folders, tasks = setup
    experts, task = moerge.load_experts(folders), load_task(tasks[0], limit=3)
    prompts = []
    writer = moerge.InstructionWriter(lambda prompt: prompts.append(prompt) or "please do flying", name="spy")
    routers = {"instruction": moerge.QueryRouter(experts, fake_embedder(), writer, threshold=0.5)}
    run = [parse_run("glider")]
    for similar, variant in ((0, "zero-shot"), (3, "few-shot")):
        settings = Settings(max_new_tokens=2, similar=similar)
        (got,) = evaluate(model, tokenizer, experts, run, [task], settings, routers=routers, progress=False)
        assert got.method == f"glider ({variant})" and prompts[-1].count("Output:") == similar


def test_a_threshold_that_is_missing_is_named_before_the_model_is_read(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moerge_ext.commands.options.build_embedder", lambda *_: fake_embedder())
    monkeypatch.setattr("moerge_ext.models.pretrained.load_model", lambda *_, **__: pytest.fail("the model was read"))
    assert command(setup, tmp_path, "--methods", "glider", "--embedder", "bag") == 2
    assert "its threshold of 0.8 belongs to nomic-embed-text-v1.5" in capsys.readouterr().err


def test_solved_examples_that_are_missing_are_named_before_the_first_answer(setup, monkeypatch):
    _, model, tokenizer, folders, tasks = setup
    monkeypatch.setattr(Answerer, "generate", lambda *_: pytest.fail("an answer was asked for"))
    experts, task = moerge.load_experts(folders), load_task(tasks[0], limit=1)
    writer = moerge.InstructionWriter(lambda prompt: "please do flying", name="spy")
    routers = {
        "instruction": moerge.QueryRouter(experts, fake_embedder(), writer, threshold=0.5),
        "few-shot": LoraHubRouter(tokenizer),
    }
    alone = replace(task, folder=task.folder / "nowhere")
    for text, where, settings, said in (
        ("glider", task, Settings(similar=99), "task ant: method 'glider' reads 99 solved examples, and .* has 6"),
        ("lorahub", alone, Settings(), "no file .*nowhere/train.jsonl"),
    ):
        runs = [parse_run("base"), parse_run(text)]
        with pytest.raises(ValueError, match=said):
            evaluate(model, tokenizer, experts, runs, [where], settings, routers=routers, progress=False)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "nothing to evaluate: pass --methods"),
        (["--methods", "glider"], "glider cannot route yet; it needs:\n- --embedder MODEL"),
        (["--methods", "ask_llm"], "- --writer MODEL, the language model that picks the expert"),
        (["--methods", "given"], "method 'given' takes weights from you"),
        (["--methods", "base", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--methods", "base", "--calibrate", "x"], "--calibrate is for glider"),
        (["--methods", "base", "--template", "Q"], "must contain {input}"),
        (["--methods", "base", "--split", "dev"], "dev.jsonl"),
        (["--methods", "base", "--multitask", "nowhere"], "'nowhere'"),
        (["--methods", "base", "--similar", "3"], "--similar and --solved are for --writer MODEL"),
        (["--methods", "glider", "--calibrate", "nowhere"], "no file nowhere/validation.jsonl"),
    ],
)
def test_eval_command_explains(setup, tmp_path, capsys, more, text):
    assert command(setup, tmp_path, *more) == 2
    assert text in capsys.readouterr().err and not (tmp_path / "out").exists()
