"""Training PELMo's router, its tables, and both commands."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import builders
import patch_cases as cases
import pytest
import torch
import transformers
from query_cases import completion, server, wide_tokenizer

from moerge_ext.commands import main as cli
from moerge_ext.ensemble.figure import plot_top_k
from moerge_ext.ensemble.judge import exact
from moerge_ext.ensemble.measure import answers_by_experts, macro, macro_difference, measure
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, few_shot
from moerge_ext.ensemble.questions import Question, domains, named_file, question_of, split, warn_of_shown
from moerge_ext.ensemble.router import PromptRouter
from moerge_ext.ensemble.train import CHECKPOINT_FOLDER, train_router
from moerge_ext.evaluation.evaluate import Score

pytest.importorskip("accelerate")
NAMES = ("one", "two")
QUESTIONS = ["aaa", "bbb", "aab", "bba"] * 6
LABELS = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]] * 6)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    cases.build("bert").save_pretrained(folder)
    wide_tokenizer(folder)
    return str(folder)


def train(encoder, folder, labels=LABELS, **options):
    options = {"epochs": 3, "lr": 5e-3, "batch_size": 4, "progress": False, "max_length": 16} | options
    return train_router(encoder, QUESTIONS, labels, NAMES, folder, **options)


@pytest.mark.parametrize("kind", ["multi-label", "single-label"])
def test_router_learns_who_is_right(encoder, tmp_path, kind):
    labels = LABELS if kind == "multi-label" else LABELS.argmax(1)
    result = train(encoder, tmp_path / "router", labels, validation=(QUESTIONS[:4], labels[:4]), epochs=6)
    assert [row["epoch"] for row in result.epochs] == [1, 2, 3, 4, 5, 6] and result.epochs[-1]["top1"] == 1
    router = PromptRouter.load(result.path)
    assert router.names == NAMES and router.max_length == 16
    ids, weights = router.select(["aaa", "bbb"], 2)
    assert ids[:, 0].tolist() == [0, 1] and (weights[:, 0] > 0.5).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    facts = json.loads((result.path / "moerge_router.json").read_text())
    assert facts["objective"] == kind and not (result.path / CHECKPOINT_FOLDER).exists()


def test_a_killed_training_goes_on(encoder, tmp_path, monkeypatch):
    whole = train(encoder, tmp_path / "whole")
    real = transformers.Trainer._save_checkpoint

    def killed(self, *args, **options):
        real(self, *args, **options)
        if self.state.epoch >= 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(encoder, tmp_path / "broken")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds no router .* train one with `moerge train-router`"):
        PromptRouter.load(tmp_path / "broken")
    again = train(encoder, tmp_path / "broken", resume=True)
    assert [row["epoch"] for row in again.epochs] == [1, 2, 3]
    for name, want in PromptRouter.load(whole.path).model.state_dict().items():
        torch.testing.assert_close(PromptRouter.load(again.path).model.state_dict()[name], want)


def test_labels_that_do_not_fit_are_refused(encoder, tmp_path):
    for labels, options, text in (
        (LABELS[:3], {}, r"labels must be \[M=24, N=2\] of 0 and 1, got \[3, 2\]"),
        (LABELS * 2, {}, "of 0 and 1"),
        (LABELS * 0, {}, "24 questions have no right expert: use label_matrix"),
        (LABELS.argmax(1) + 1, {}, r"expert ids in 0 .. 1, got \[24\] torch.int64, 1 to 2"),
        (
            LABELS,
            {"validation": (["a"], torch.tensor([0]))},
            "training labels are multi-label, validation labels single",
        ),
        (LABELS, {"epochs": 0}, "epochs must be at least 1, got 0"),
        (LABELS, {"lr": 2.0}, "lr must be in"),
    ):
        with pytest.raises(ValueError, match=text):
            train(encoder, tmp_path / "router", labels, **options)
    with pytest.raises(ValueError, match="no questions"):
        train_router(encoder, [], LABELS[:0], NAMES, tmp_path / "router")
    assert not (tmp_path / "router").exists()


# ---- tables ----------------------------------------------------------------------------------------------------------


class Fixed(PromptRouter):
    """Weights without a model."""

    def __init__(self, names, first):
        self.names, self.first = names, first

    def probabilities(self, questions):
        return torch.stack([torch.tensor([0.8, 0.2] if self.first(q) == 0 else [0.2, 0.8]) for q in questions])


def experts():
    return [few_shot(name, count=0, template=Template(question=name + ": {input}")) for name in NAMES]


def asked(*texts, dataset="questions", golds=("x",)):
    return [Question(text, golds, dataset) for text in texts]


def test_tables(tmp_path):
    mix = PromptEnsemble(cases.build("llama"), wide_tokenizer(tmp_path), experts())
    texts = ["abc", "de", "hello"]
    options = {"max_new_tokens": 3, "progress": False, "output": tmp_path}
    answers = answers_by_experts(mix, texts, **options)
    golds = [(answers[0][0],), ("never", answers[1][1]), ("never said",)]
    questions = [Question(*row) for row in zip(texts, golds, ("nq", "gsm8k", "nq"), strict=True)]
    router, single = Fixed(NAMES, lambda q: q == "de"), Fixed(NAMES, lambda q: 0)
    baseline = {
        name: few_shot(f"specific {name}", count=0, template=Template(name + " {input}")) for name in ("nq", "gsm8k")
    }
    given = {"router": router, "single_label": single, "few_shot": baseline, "top_ks": (1, 2)}
    scores = measure(mix, questions, exact, **given, **options)
    rows = ["specific few-shot", "one", "two", "top-1", "top-2", "single-label top-1", "single-label top-2"]
    assert list(dict.fromkeys(s.method for s in scores)) == [*rows, "oracle_question"]
    items = {(s.method, s.task): s.items for s in scores}
    assert items["oracle_question", "nq"] == (True, False) and items["oracle_question", "gsm8k"] == (True,)
    for task in ("nq", "gsm8k"):
        assert items["top-1", task] == items["oracle_question", task]
        assert items["single-label top-1", task] == items["one", task]
    assert macro(scores, "oracle_question") == 0.75  # of the datasets, not 2 of 3 questions
    mean, low, high = macro_difference(scores, "oracle_question", "two")
    assert mean == 0.75 - macro(scores, "two") and low <= mean <= high
    single_2 = mix.answer(texts, select=single.select(texts, 2), max_new_tokens=3)
    lines = next((tmp_path / "answers").glob("single-label_top-2.*.jsonl")).read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines[1:]] == single_2
    specific = next((tmp_path / "answers").glob("specific_few-shot.*.jsonl")).read_text().splitlines()
    prompts = [baseline[q.dataset].prompt(q.text) for q in questions]
    assert [json.loads(line)["answer"] for line in specific[1:]] == mix.asked.generate(prompts, 3)
    with gzip.open(tmp_path / "items.jsonl.gz", "rt") as file:
        kept = [json.loads(line) for line in file]
    assert [line["question"] for line in kept] == texts and kept[1]["golds"] == list(golds[1])
    assert [line["answers"]["single-label top-2"] for line in kept] == single_2
    for score in scores:
        assert score.items == tuple(line["right"][score.method] for line in kept if line["dataset"] == score.task)
    mix.answer = lambda *_, **__: pytest.fail("an answer was asked for again")
    given["few_shot"] = None
    assert measure(mix, questions, {"nq": exact, "gsm8k": exact}, **given, **options) == scores[2:]


def test_tables_explain(tmp_path):
    mix = PromptEnsemble(cases.build("llama"), wide_tokenizer(tmp_path), experts())
    router = Fixed(NAMES, lambda q: 0)
    mix.answer = lambda *_, **__: pytest.fail("work was done before the refusal")
    for questions, judge, options, text in (
        (asked("a"), exact, {"router": Fixed(("a",), None)}, "a router for a cannot serve one, two"),
        (asked("a"), exact, {"top_ks": (1, 3)}, "number of experts, 2; got 3"),
        ([], exact, {}, "no questions"),
        (asked("a"), {"nq": exact}, {}, "there is no judge for questions; only for nq"),
        (asked("a"), exact, {"few_shot": {"nq": None}}, "no few-shot baseline for questions; only for nq"),
        (asked("a" * 120), exact, {}, "(?s)do not fit the context of 128.*'one': .* question 0"),
    ):
        with pytest.raises(ValueError, match=text):
            measure(mix, questions, judge, **{"router": router, "top_ks": (1, 2), "max_new_tokens": 9} | options)
    mix = PromptEnsemble(mix.asked.model, mix.asked.tokenizer, [few_shot("top-1", count=0), experts()[0]])
    with pytest.raises(ValueError, match="an expert cannot be called 'top-1'"):
        measure(mix, asked("a"), exact, router=Fixed(("top-1", "one"), None), top_ks=(1,))


def test_answers_are_of_the_experts_content(tmp_path):
    """An expert that asks otherwise is asked again, whatever file its demonstrations lie in; the others are not."""
    model, tokenizer = cases.build("llama"), wide_tokenizer(tmp_path)
    rows = [{"input": c, "target": c} for c in "abcdef"]
    short = Template(question="{input}:", answer="{target}.")
    seen = []

    def answered(seed):
        pair = [
            few_shot("one", rows, count=2, template=short),
            few_shot("two", rows, count=2, seed=seed, template=short),
        ]
        mix = PromptEnsemble(model, tokenizer, pair)
        real = mix.answer
        mix.answer = lambda *a, **o: seen.append(int(o["select"][0][0, 0])) or real(*a, **o)
        answers_by_experts(mix, ["abc"], output=tmp_path, max_new_tokens=2, progress=False)

    answered(0), answered(0), answered(1)
    assert seen == [0, 1, 1]


def test_the_validation_share_is_of_every_dataset():
    questions = [*asked(*"abcdefghij", dataset="nq"), *asked(*"abcdefghijklmnopqrst", dataset="gsm8k"), *asked("a")]
    rest, held = split(questions, 0.2, 0)
    assert sorted(rest + held) == list(range(31)) and rest == sorted(rest)
    assert [questions[i].dataset for i in held] == ["nq"] * 2 + ["gsm8k"] * 4
    assert split(questions, 0.2, 0)[1] == held != split(questions, 0.2, 1)[1]
    assert held != [8, 9, 26, 27, 28, 29] and split(questions, 0.0, 0)[1] == []
    assert len(split(questions, 0.99, 0)[0]) == 3, "a dataset must keep a question for training"


def test_questions_of_rows_and_files(tmp_path, monkeypatch):
    row = {"input": "i", "target": "NYC", "targets": ["New York", "NYC"], "dataset": "nq", "domain": "one"}
    assert question_of(row, "q", "file") == Question("q", ("NYC", "New York"), "nq", "one")
    assert question_of({"target": "a"}, "q", "file") == Question("q", ("a",), "file")
    for wrong in ({"targets": "NYC"}, {"targets": [1]}, {"dataset": 3}):
        with pytest.raises(ValueError, match=f'"{next(iter(wrong))}" must be a'):
            question_of({"target": "a", **wrong}, "q", "file")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.jsonl").touch()
    assert named_file("x/nq.jsonl") == ("nq", Path("x/nq.jsonl")) and named_file("nq/test.jsonl")[0] == "nq"
    assert named_file("nq=x/y.jsonl") == ("nq", Path("x/y.jsonl")) and named_file("a=b.jsonl")[1] == Path("a=b.jsonl")
    questions = [Question("q", ("a",), "nq"), Question("q", ("a",), "two"), Question("q", ("a",), "nq", "two")]
    assert domains(questions, NAMES, {"nq": "one"}) == [0, 1, 1]
    with pytest.raises(ValueError, match=r"row 0 \(from 0\) has None and is of the dataset 'nq' \(1 such rows\)"):
        domains(questions, NAMES)


def test_questions_that_are_demonstrations_are_noticed(recwarn):
    pair = [few_shot(name, [{"input": name, "target": "x"}], count=1) for name in NAMES]
    warn_of_shown(asked("other"), pair)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="shown with their answers, as demonstrations: 1 by two"):
        warn_of_shown(asked("two", "three"), pair)


def test_the_figure_has_a_line_for_every_dataset(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn = {}
    real = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, y, **o: drawn.update({o["label"]: (x, y)}) or real(self, x, y, **o)
    )
    rows = {"top-1": ((1, 0), (0, 0)), "top-2": ((1, 1), (0, 1)), "one": ((0, 0), (0, 0))}
    scores = [
        Score(name, task, "", "judge", 2, sum(items), None, items)
        for name, both in rows.items()
        for task, items in zip(("nq", "gsm8k"), both, strict=True)
    ]
    assert plot_top_k(scores, ["one"], tmp_path / "k.png").stat().st_size > 5000
    assert drawn == {"nq": ([1, 2], [50, 100]), "gsm8k": ([1, 2], [0, 50]), "macro-average": ([1, 2], [25, 75])}
    drawn.clear()
    plot_top_k([s for s in scores if s.task == "nq"], ["one"], tmp_path / "k.png")
    assert list(drawn) == ["nq"]


@pytest.fixture
def files(tmp_path):
    model = cases.build("llama")
    model.save_pretrained(tmp_path / "model")
    wide_tokenizer(tmp_path / "model")
    builders.random_experts(model, tmp_path, ["ant"], cases.DECODER)
    template = {"question": "{input}:"}
    entries = [{"name": "one", "template": template}, {"name": "two", "lora": "ant", "template": template}]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    mix = PromptEnsemble(
        model, wide_tokenizer(tmp_path / "model"), [few_shot("one", count=0, template=Template("{input}:"))]
    )
    golds = mix.answer_by("one", QUESTIONS[:12], max_new_tokens=3)
    rows = [{"input": q, "target": g, "domain": "one"} for q, g in zip(QUESTIONS, golds, strict=False)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.json", "--data", tmp_path / "data.jsonl"]
    return tmp_path, [*shared, "--max-new-tokens", 3, "--no-progress"]


def command(*words):
    return cli.main([str(word) for word in words])


def test_both_commands(files, encoder, capsys, recwarn):
    pytest.importorskip("matplotlib")
    root, shared = files
    train = ["train-router", "--overwrite", *shared, "--router", encoder, "--epochs", 1, "--output"]
    assert command(*train, root / "multi", "--nobody-right", "drop") == 0
    out = capsys.readouterr().out
    assert "one: right in 100.0% of 12 questions" in out and "epoch 1: validation loss" in out
    assert "left out, as no expert is right: 0 of 12" in out
    assert command(*train, root / "single", "--single-label") == 0
    routers = ["--router", root / "multi", "--single-label-router", root / "single"]
    assert command("ensemble", "--overwrite", *shared, *routers, "--output", root / "out") == 0
    out = capsys.readouterr().out
    assert "paired 95 % interval" in out and "oracle_question" in out
    rows = {row["method"]: row["score"] for row in json.loads((root / "out" / "results.json").read_text())}
    names = {"one", "two", "top-1", "top-2", "single-label top-1", "single-label top-2", "oracle_question"}
    assert set(rows) == names and rows["one"] == 1
    assert (root / "out" / "top_k.png").stat().st_size > 5000 and (root / "out" / "paired.json").is_file()
    assert not [w for w in recwarn.list if "router may not fit" in str(w.message)]
    (root / "short.jsonl").write_text((root / "data.jsonl").read_text().split("\n")[0])
    words = ["ensemble", "--overwrite", *shared, *routers, "--data", root / "short.jsonl", "--output", root / "other"]
    with pytest.warns(UserWarning, match="it was trained with --template '{input}', and is asked with --template 'x"):
        assert command(*words, "--template", "x{input}") == 0


def test_datasets_from_the_shell(files, encoder, capsys):
    """Two files with a judge each, the baseline beside the pool, the router from the file, answers after a cue."""
    root, shared = files
    rows = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    for name, part in (("nq", rows[:6]), ("gsm8k", [{**row, "target": "7"} for row in rows[6:]])):
        (root / name).mkdir()
        (root / name / "test.jsonl").write_text("\n".join(json.dumps(row) for row in part))
    parts = {"experts": json.loads((root / "prompts.json").read_text()), "router": "multi", "stop": ["zzz"]}
    parts["few_shot"] = {"demonstrations": {n: f"{n}/test.jsonl" for n in ("nq", "gsm8k")}, "count": 1}
    parts["few_shot"]["template"] = {"question": "{input}:", "answer": "{target}."}
    (root / "prompts.json").write_text(json.dumps(parts))
    data = [*shared, "--data", root / "nq" / "test.jsonl", root / "gsm8k" / "test.jsonl", "--judge", "exact"]
    train = [
        "train-router",
        "--overwrite",
        *data,
        "gsm8k=numeric",
        "--router",
        encoder,
        "--epochs",
        1,
        "--output",
        root / "multi",
    ]
    assert command(*train, "--nobody-right", "drop") == 0
    assert "left out, as no expert is right: 6 of 12" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="demonstrations: 1 by specific few-shot nq, 1 by specific few-shot gsm8k"):
        assert command("ensemble", "--overwrite", *data, "gsm8k=numeric", "--output", root / "out") == 0
    lines = (root / "out" / "results.md").read_text().splitlines()
    assert "| nq (n=6) | gsm8k (n=6) |" in lines[0] and lines[2].startswith("| specific few-shot |")
    (one,) = [line for line in lines if line.startswith("| one |")]
    assert one.startswith("| one | 50.0 ") and "| 100.0 " in one and "| 0.0 " in one


def test_a_language_model_judges_from_the_shell(files, encoder, capsys, tmp_path, monkeypatch):
    root, shared = files
    monkeypatch.setenv("MOERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    train = ["train-router", "--overwrite", *shared, "--router", encoder, "--epochs", 1, "--output", root / "multi"]
    with server(completion("yes")) as (url, seen):
        judge = ["--judge", "llm", "--judge-model", "gpt", "--judge-url", url, "--nobody-right", "drop"]
        assert command(*train, *judge) == 0
        assert "one: right in 100.0%" in capsys.readouterr().out
    asked = [request["messages"][0]["content"] for request in seen]
    assert seen[0]["key"] == "Bearer secret" and len(asked) == len(set(asked)) and "two plus two" in asked[0]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("model read"))
        with server(completion("perhaps")) as (url, _):
            judge[judge.index("--judge-url") + 1] = url
            patched.setattr("time.sleep", lambda _: None)
            assert command(*train, *judge) == 2
    assert "expected a verdict, yes or no, got 'perhaps'" in capsys.readouterr().err


def test_commands_explain(files, encoder, capsys):
    root, shared = files
    train = ["train-router", "--overwrite", *shared, "--router", encoder, "--output", root / "router"]
    for words, text in (
        ([*train, "--theta", "0.5"], "--theta needs --embedder"),
        (train, "pass --embedder MODEL and --theta X"),
        ([*train, "--validation-share", "1"], "--validation-share must be in [0, 1), got 1"),
        ([*train, "--nobody-right", "drop", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["ensemble", "--overwrite", *shared, "--router", root / "nowhere"], "holds no router"),
        (["ensemble", "--overwrite", *shared], "a router is needed: --router DIR"),
    ):
        assert command(*words) == 2
        assert text in capsys.readouterr().err
    (root / "data.jsonl").write_text('{"input": "a", "target": "b"}')
    assert command(*train, "--single-label") == 2
    assert 'needs rows with "domain", one of one, two' in capsys.readouterr().err
