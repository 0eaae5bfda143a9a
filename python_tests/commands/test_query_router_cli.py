"""`moerge train-query-router` from the answers of `moerge eval`, and `moerge eval --query-router`."""

from __future__ import annotations

import gzip
import json
import shutil

import builders
import patch_cases as cases
import pytest
from builders import make_tokenizer
from query_cases import fake_embedder

from moerge_ext.commands import main as cli

pytest.importorskip("sklearn")
KINDS = {
    "benchmark": (["--neighbours", "3"], "benchmark_routing/neighbours=3"),
    "zooter": (["--beta", "0.5"], "zooter"),
    "routoo": (["--cost", "ant=1", "--cost", "bee=2", "--cost", "cat=3", "--cost", "base=0"], "routoo/budget=1.5"),
    "routellm-mf": (["--epochs", "3"], "routellm_mf/strong=cat/weak=base"),
    "routellm-classifier": (["--strong", "ant", "--weak", "cat"], "routellm_classifier"),
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """A model, three experts, two tasks, and the answers of every expert and the base to them."""
    root = tmp_path_factory.mktemp("routers")
    model = cases.build("llama")
    model.save_pretrained(root / "model")
    make_tokenizer(root / "model")
    experts = builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER)
    tasks = []
    for name in ("one", "two"):
        folder = root / name
        folder.mkdir()
        rows = [{"input": f"{name} {'xyz'[i % 3]}", "target": "ab", "choices": ["ab", "c", "de"]} for i in range(6)]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "meta.json").write_text(json.dumps({"task": name, "metric": "rank"}))
        tasks.append(str(folder))
    where = ["--experts", *map(str, experts.values()), "--tasks", *tasks]
    runs = ",".join(f"expert:{name}" for name in cases.NAMES)
    assert cli.main(evaluation(root, where, f"base,{runs}")) == 0
    return root, where


@pytest.fixture(autouse=True)
def embedder(monkeypatch):
    for module in ("options", "train_query_router"):
        monkeypatch.setattr(f"moerge_ext.commands.{module}.build_embedder", lambda *_: fake_embedder())


def evaluation(root, where, methods, *more):
    return [
        "eval",
        "--overwrite",
        "--embedder",
        "bag",
        "--model",
        str(root / "model"),
        *where,
        "--methods",
        methods,
        "--output",
        str(root / "out"),
        *more,
    ]


def training(root, where, kind, *more):
    common = ["train-query-router", kind, "--overwrite", *where, "--output", str(root / kind), "--embedder", "bag"]
    return [*common, "--no-progress", *more]


def test_from_answers_to_a_row_of_the_table(setup, tmp_path, capsys):
    root, where = setup
    judged = tmp_path / "judged.jsonl"
    for i in range(12):
        scores = {name: float(i % 3 == e) for e, name in enumerate(cases.NAMES)} | {"base": 0.5}
        row = {"input": f"{'xyz'[i % 3]} {i}", "task": f"{i % 2}", "scores": scores}
        with open(judged, "a") as file:
            file.write(json.dumps(row) + "\n")
    assert (
        cli.main(training(root, where, "benchmark", "--answers", str(root / "out"), "--base", "--neighbours", "3")) == 0
    )
    assert "base: mean score" in capsys.readouterr().out
    experts = where[: where.index("--tasks")]
    for kind, (options, _) in KINDS.items():
        if kind != "benchmark":
            assert cli.main(training(root, experts, kind, "--judged", str(judged), *options)) == 0
    routers = [part for kind in KINDS for part in ("--query-router", str(root / kind))]
    methods = [method for _, method in KINDS.values()]
    assert cli.main(evaluation(root, where, ",".join(methods), *routers)) == 0
    table = (root / "out" / "results.csv").read_text() if (root / "out" / "results.csv").exists() else ""
    said = table + capsys.readouterr().out
    assert all(method in said for method in methods)


def test_what_is_missing_is_said(setup, tmp_path, capsys):
    root, where = setup
    assert cli.main(evaluation(root, where, "zooter")) == 2
    assert "- --query-router DIR, made by `moerge train-query-router zooter`" in capsys.readouterr().err
    shutil.copytree(root / "out", tmp_path / "out")
    answers = tmp_path / "out" / "answers" / "one"
    (file,) = answers.glob("expert_bee.*")
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:4]))
    (other,) = answers.glob("expert_cat.*")
    other.with_name("expert_cat.0.jsonl.gz").write_bytes(gzip.compress(other.read_bytes()))
    ask = ["--answers", str(tmp_path / "out")]
    assert cli.main(training(root, where, "routoo", *ask, "--output", str(tmp_path / "made"))) == 2
    said = capsys.readouterr().err
    assert "bee, task one: no answers to its 6 rows" in said and "only 3 of them" in said
    assert "cat, task one: answers of several models" in said and "moerge eval --methods expert:ant" in said
    assert not (tmp_path / "made").exists()
    for more, text in (
        ([], "pass --answers DIR with --tasks, or --judged FILE"),
        (["--data", "ant=x"], "routoo learns from judged answers"),
        ([*ask, "--strong", "ant"], "--strong is not for routoo"),
        ([*ask, "--cost", "ant=much"], "--cost takes NAME=X with a number X"),
        (["--judged", str(tmp_path / "none")], "there is no file"),
    ):
        assert cli.main(training(root, where, "routoo", *more)) == 2
        assert text in capsys.readouterr().err
