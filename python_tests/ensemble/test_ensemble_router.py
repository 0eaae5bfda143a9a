"""Training PELMo's router, its tables, and both commands."""

from __future__ import annotations

import json

import builders
import patch_cases as cases
import pytest
import torch
import transformers
from query_cases import wide_tokenizer

from moerge_ext.commands import main as cli
from moerge_ext.ensemble.judge import exact
from moerge_ext.ensemble.measure import answers_by_experts, measure
from moerge_ext.ensemble.mixture import PromptEnsemble
from moerge_ext.ensemble.prompts import Template, few_shot
from moerge_ext.ensemble.router import PromptRouter
from moerge_ext.ensemble.train import CHECKPOINT_FOLDER, train_router

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


def test_tables(tmp_path):
    mix = PromptEnsemble(cases.build("llama"), wide_tokenizer(tmp_path), experts())
    questions = ["abc", "de", "hello"]
    options = {"max_new_tokens": 3, "progress": False}
    answers = answers_by_experts(mix, questions, **options)
    golds = [answers[0][0], answers[1][1], "never said"]
    router, single = Fixed(NAMES, lambda q: q == "de"), Fixed(NAMES, lambda q: 0)
    scores = measure(
        mix, questions, golds, exact, router=router, single_label=single, top_ks=(1, 2), output=tmp_path, **options
    )
    assert [s.method for s in scores] == ["one", "two", "top-1", "top-2", "single-label", "oracle_question"]
    items = {s.method: s.items for s in scores}
    assert items["oracle_question"] == (True, True, False)
    assert items["top-1"] == items["oracle_question"] and items["single-label"] == items["one"]
    lines = next((tmp_path / "answers").glob("top-2.*.jsonl")).read_text().splitlines()
    assert len(lines) == 4
    mix.answer = lambda *_, **__: pytest.fail("an answer was asked for again")
    again = measure(
        mix, questions, golds, exact, router=router, single_label=single, top_ks=(1, 2), output=tmp_path, **options
    )
    assert again == scores
    with pytest.raises(ValueError, match="a router for a cannot serve one, two"):
        measure(mix, questions, golds, exact, router=Fixed(("a",), None))
    with pytest.raises(ValueError, match="number of experts, 2; got 3"):
        measure(mix, questions, golds, exact, router=router, top_ks=(1, 3))
    with pytest.raises(ValueError, match="got 1 and 3"):
        measure(mix, questions, ["x"], exact, router=router)


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


def test_both_commands(files, encoder, capsys):
    pytest.importorskip("matplotlib")
    root, shared = files
    train = ["train-router", *shared, "--router", encoder, "--epochs", 1, "--output"]
    assert command(*train, root / "multi") == 0
    out = capsys.readouterr().out
    assert "one: right in 100.0% of 12 questions" in out and "epoch 1: validation loss" in out
    assert command(*train, root / "single", "--single-label") == 0
    routers = ["--router", root / "multi", "--single-label-router", root / "single"]
    assert command("ensemble", *shared, *routers, "--output", root / "out") == 0
    out = capsys.readouterr().out
    assert "paired 95 % interval" in out and "oracle_question" in out
    rows = {row["method"]: row["score"] for row in json.loads((root / "out" / "results.json").read_text())}
    assert set(rows) == {"one", "two", "top-1", "top-2", "single-label", "oracle_question"} and rows["one"] == 1
    assert (root / "out" / "top_k.png").stat().st_size > 5000 and (root / "out" / "paired.json").is_file()


def test_commands_explain(files, encoder, capsys):
    root, shared = files
    train = ["train-router", *shared, "--router", encoder, "--output", root / "router"]
    for words, text in (
        ([*train, "--theta", "0.5"], "--theta needs --embedder"),
        ([*train, "--validation-share", "1"], "--validation-share must be in [0, 1), got 1"),
        ([*train, "--limit", "0"], "--limit must be at least 1, got 0"),
        (["ensemble", *shared, "--router", root / "nowhere"], "holds no router"),
    ):
        assert command(*words) == 2
        assert text in capsys.readouterr().err
    (root / "data.jsonl").write_text('{"input": "a", "target": "b"}')
    assert command(*train, "--single-label") == 2
    assert 'needs rows with "domain", one of one, two; row 0 (from 0) has None' in capsys.readouterr().err
    with pytest.warns(UserWarning, match="never right"):
        assert command(*train) == 2
    assert "pass an embedder and theta" in capsys.readouterr().err
