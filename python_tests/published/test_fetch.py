"""Stand-ins in the layout of the hub's repositories, through `moerge fetch-tasks`, to tasks that are evaluated."""

from __future__ import annotations

import json
import random

import pytest

from moerge_ext.commands.main import main
from moerge_ext.evaluation.tasks import load_task
from moerge_ext.files.rows import read_rows
from moerge_ext.published import layouts
from moerge_ext.published.collections import COLLECTIONS
from moerge_ext.published.fetch import fetch

pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def repository(folder, configurations):
    """A copy of a repository: {configuration: {split: rows}} as JSON lines, named in the header of its README."""
    header = ["---", "configs:"]
    for name, splits in configurations.items():
        header += [f"- config_name: {json.dumps(name)}", "  data_files:"]
        for split, rows in splits.items():
            path = f"{name}/{split}.jsonl"
            header += [f"  - split: {split}", f"    path: {json.dumps(path)}"]
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("\n".join([*header, "---", ""]))


def fetched(tmp_path, collection, *names, **options):
    options.setdefault("copies", tmp_path / "hub")
    made = list(fetch(collection, tmp_path / "out", tasks=names or None, progress=False, **options))
    return {task.folder.name: task for task in made}


def rows_of(tmp_path, task, split):
    return read_rows(tmp_path / "out" / task / f"{split}.jsonl")


def p3_rows(word, count, choices=("yes", "no")):
    rows = []
    for i in range(count):
        row = {"inputs": [1, 2], "inputs_pretokenized": f"\n{word} {i}? ", "targets": [3, 1]}
        rows.append({**row, "targets_pretokenized": f"\n{'yes' if i % 2 else 'no'}", "answer_choices": list(choices)})
    return rows


def test_t0_pools_the_prompts_of_a_data_set(tmp_path):
    score = {"idx": [0, 0], "is_correct": True, "weight": 1.0, "inputs_pretokenized": "a", "targets_pretokenized": "b"}
    repository(
        tmp_path / "hub" / "bigscience" / "P3",
        {
            "imdb_one": {"train": p3_rows("one", 40), "test": p3_rows("test one", 5)},
            "imdb_two": {"train": p3_rows("two", 40), "test": p3_rows("test two", 5)},
            "imdb_two_score_eval": {"train": [score]},
            "app_reviews_x": {"train": [{**row, "answer_choices": None} for row in p3_rows("review", 30)]},
        },
    )
    sizes = {"train": 20, "validation": 4, "test": 6}
    made = fetched(tmp_path, "t0", "imdb", "app_reviews", sizes=sizes)
    assert made["imdb"].rows == {"train": 20, "validation": 4, "test": 6}
    train = rows_of(tmp_path, "imdb", "train")
    assert {row["prompt"] for row in train} == {"imdb_one", "imdb_two"}
    assert all(row["choices"] == ["yes", "no"] and row["target"] in row["choices"] for row in train)
    assert not any(row["input"].startswith(("\n", "test")) or row["input"] != row["input"].strip() for row in train)
    held = {row["input"] for split in ("validation", "test") for row in rows_of(tmp_path, "imdb", split)}
    assert not held & {row["input"] for row in train} and len(held) == 10
    assert all(row["input"].startswith("test ") for row in rows_of(tmp_path, "imdb", "test"))
    task = load_task(tmp_path / "out" / "imdb")
    assert task.metric == "rank" and task.part == "train" and task.chance == 0.5
    # without a validation or test split all three are cut from train; answers without choices are compared as they are
    assert made["app_reviews"].rows == {"train": 20, "validation": 4, "test": 6}
    assert load_task(tmp_path / "out" / "app_reviews").metric == "exact_match"


def test_a_task_is_fetched_once_and_a_cut_off_one_again(tmp_path):
    repository(
        tmp_path / "hub" / "bigscience" / "P3", {"imdb_one": {"train": p3_rows("one", 40), "test": p3_rows("t", 5)}}
    )
    first = fetched(tmp_path, "t0", "imdb")["imdb"]
    text = (first.folder / "train.jsonl").read_text()
    assert fetched(tmp_path, "t0", "imdb")["imdb"].already
    (first.folder / "meta.json").unlink()
    (first.folder / "train.jsonl").write_text("")
    again = fetched(tmp_path, "t0", "imdb")["imdb"]
    assert not again.already and (first.folder / "train.jsonl").read_text() == text  # the same seed, the same draw
    with pytest.raises(ValueError, match="holds another task, or one drawn otherwise: remove it"):
        fetched(tmp_path, "t0", "imdb", seed=1)
    (tmp_path / "out" / "trec").mkdir()
    (tmp_path / "out" / "trec" / "notes.txt").write_text("mine")
    repository(tmp_path / "hub" / "bigscience" / "P3", {"trec_one": {"train": p3_rows("one", 40)}})
    with pytest.raises(ValueError, match="holds files that are no task"):
        fetched(tmp_path, "t0", "trec")


def test_t0_held_out_ranks_and_tells_anlis_rounds_apart(tmp_path):
    plain = [{**row, "answer_choices": []} for row in p3_rows("plain", 4)]
    repository(
        tmp_path / "hub" / "bigscience" / "P3",
        {
            "anli_GPT_3_style_r1": {"train": p3_rows("a", 20), "validation": p3_rows("r1", 6)},
            "anli_GPT_3_style_r2": {"train": p3_rows("b", 20), "validation": p3_rows("r2", 6)},
            "super_glue_copa_x": {"train": p3_rows("c", 20), "validation": p3_rows("copa", 6)},
            "super_glue_copa_free": {"train": plain, "validation": plain},
        },
    )
    fetched(tmp_path, "t0_heldout", "anli_r1", "copa")
    assert all(row["input"].startswith("r1 ") for row in rows_of(tmp_path, "anli_r1", "test"))
    assert {row["prompt"] for row in rows_of(tmp_path, "copa", "test")} == {"super_glue_copa_x"}
    assert (
        load_task(tmp_path / "out" / "copa").metric == "rank" and load_task(tmp_path / "out" / "copa").part == "heldout"
    )


def bigbench_row(text, targets, choices=(), scores=()):
    row = {"idx": 0, "inputs": text, "targets": list(targets)}
    return {**row, "multiple_choice_targets": list(choices), "multiple_choice_scores": list(scores)}


def test_big_bench(tmp_path):
    ranked = [bigbench_row(f"Q: {i}\nA:", ["b"], ["a", "b", "c"], [0, 1, 0]) for i in range(4)]
    several = [bigbench_row(f"several {i}", ["a", "c"], ["a", "b", "c"], [1, 0, 1]) for i in range(2)]
    none = [bigbench_row("no right one", [], ["a", "b"], [0, 0]), bigbench_row("no input's answer", [""])]
    free = [bigbench_row(f"count {i}", ["3", "three"]) for i in range(3)]
    repository(
        tmp_path / "hub" / "tasksource" / "bigbench",
        {
            "navigate": {"train": ranked, "validation": several + none},
            "object_counting": {"train": free[:2], "validation": free[2:]},
            "operators": {"train": free[:1]},
            "dyck_languages": {"train": free[:1]},
        },
    )
    repository(
        tmp_path / "hub" / "SaylorTwift" / "bbh", {"web_of_lies": {"test": [{"input": "Lies?", "target": "Yes"}]}}
    )
    made = fetched(tmp_path, "bbh", "navigate", "object_counting", "web_of_lies", "dyck_languages")
    assert made["navigate"].rows == {"test": 6}  # train and validation together
    rows = {row["input"]: row for row in rows_of(tmp_path, "navigate", "test")}
    assert rows["Q: 0\nA:"]["target"] == "b" and "targets" not in rows["Q: 0\nA:"]
    assert rows["several 0"]["target"] == "a" and rows["several 0"]["targets"] == ["a", "c"]
    assert load_task(tmp_path / "out" / "navigate").metric == "rank"
    (first, *_) = rows_of(tmp_path, "object_counting", "test")
    assert first["target"] == "three" and first["targets"] == ["3", "three"] and first["dataset"] == "object_counting"
    assert load_task(tmp_path / "out" / "web_of_lies").metric == "exact_match"
    assert fetched(tmp_path, "bbl", "operators")["operators"].rows == {"test": 1}


def test_flan_is_read_from_its_files(tmp_path):
    hub = tmp_path / "hub" / "Muennighoff" / "flan"
    for split, count in (("train", 30), ("validation", 4), ("test", 9)):
        for task in ("rte", "snli", "squad_v1"):
            rows = [
                {"inputs": f"{task} {split} {i}", "targets": "yes", "task": f"{task}_10templates"} for i in range(count)
            ]
            (hub / split).mkdir(parents=True, exist_ok=True)
            path = hub / split / f"{task}_10templates_{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = fetched(tmp_path, "flan", "snli", sizes={"test": 3})["snli"]
    assert made.rows == {"train": 27, "validation": 3, "test": 3}
    assert all(row["input"].startswith("snli validation") for row in rows_of(tmp_path, "snli", "test"))
    with pytest.raises(ValueError, match=r"no row of \{split\}/sst2_10templates\* can be used for task sst2"):
        fetched(tmp_path, "flan", "sst2")


def test_the_question_sets_of_pelmo(tmp_path):
    choices = {"label": ["A", "B"], "text": ["bank", "sea "]}
    csqa = [{"id": str(i), "question": f"Where {i}?", "question_concept": "x", "choices": choices} for i in range(12)]
    hotpot = {
        "id": "1",
        "answer": "Ann",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": [],
        "context": ["long"],
    }
    sets = {
        "google-research-datasets/nq_open": {
            "nq_open": [{"question": f"who {i}", "answer": ["Ann", "Ann B", "Ann"]} for i in range(12)]
        },
        "hotpotqa/hotpot_qa": {"distractor": [{**hotpot, "question": f"whose {i}?"} for i in range(12)]},
        "tau/commonsense_qa": {"default": [{**row, "answerKey": "B"} for row in csqa]},
        "openai/gsm8k": {
            "main": [{"question": f"{i} apples?", "answer": f"{i} and\n500.\n#### 1,50{i}"} for i in range(12)]
        },
    }
    for path, by_config in sets.items():
        splits = ("train", "test") if path.endswith("gsm8k") else ("train", "validation")
        halves = {config: {splits[0]: rows[:10], splits[1]: rows[10:]} for config, rows in by_config.items()}
        repository(tmp_path / "hub" / path, halves)
    made = fetched(tmp_path, "pelmo")
    assert all(task.rows == {"train": 9, "validation": 1, "test": 2} for task in made.values()) and len(made) == 4
    nq, hotpotqa, csqa_row, gsm = (rows_of(tmp_path, name, "test")[0] for name in ("nq", "hotpotqa", "csqa", "gsm8k"))
    assert nq["target"] == "Ann" and nq["targets"] == ["Ann", "Ann B"] and nq["dataset"] == "nq"
    assert hotpotqa["input"].startswith("whose") and "long" not in hotpotqa["input"]
    assert csqa_row["target"] == "sea" and csqa_row["choices"] == ["bank", "sea"]
    assert csqa_row["input"].endswith("?\nChoices:\n- bank\n- sea")
    assert gsm["target"].startswith("1501") and gsm["rationale"].endswith("and\n500.")
    assert load_task(tmp_path / "out" / "csqa").metric == "rank"


def test_what_cannot_be_used_is_none():
    assert (
        layouts.commonsense_qa({"question": "q", "choices": {"label": ["A"], "text": ["a"]}, "answerKey": ""}) is None
    )
    assert layouts.gsm8k({"question": "q", "answer": "no mark"}) is None
    assert (
        layouts.nq_open({"question": "q", "answer": []}) is None and layouts.bbh({"input": " ", "target": "a"}) is None
    )
    assert layouts.flan({"inputs": "x", "targets": "y", "definition": "Add."})["input"] == "Add.\n\nx"


def test_the_collections_are_the_papers():
    """PHATGOOSE, section 4.1 and appendix B: 36, 11, 23 - 1 and 24 - 7; PELMo: four."""
    sizes = {name: len(row.tasks) for name, row in COLLECTIONS.items()}
    assert sizes == {"t0": 36, "t0_heldout": 11, "flan": 33, "bbh": 22, "bbl": 17, "pelmo": 4}
    assert len(COLLECTIONS["bbh"].optional) == 1 and len(COLLECTIONS["bbl"].optional) == 7
    for row in COLLECTIONS.values():
        assert row.part in ("train", "heldout") and not set(row.tasks) & set(row.optional)


def test_errors_say_what_to_do(tmp_path, capsys, monkeypatch):
    repository(tmp_path / "hub" / "bigscience" / "P3", {"imdb_one": {"train": [{"text": "a"}]}})
    out = ["--output", str(tmp_path / "out"), "--from", str(tmp_path / "hub")]
    for words, text in [
        (["t0", *out, "--tasks", "imbd"], "no task imbd among adversarial_qa, "),
        (["t0", *out, "--tasks", "imbd"], "did you mean imdb?"),
        (
            ["t0", *out, "--tasks", "imdb"],
            "bigscience/P3, imdb_one, split train must have the columns inputs_pretokenized, ",
        ),
        (["t0", *out, "--tasks", "trec", "imdb"], "- trec: bigscience/P3 has no configuration trec_*"),
        (["pelmo", *out], "there is no copy of google-research-datasets/nq_open in "),
        (["t0", "--tasks", "imdb"], "--output DIR is needed"),
        (["t0", *out, "--test", "0"], "--test must be at least 1, got 0"),
    ]:
        assert main(["fetch-tasks", *words]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out" / "imdb").exists()
    assert main(["fetch-tasks"]) == 0
    assert "bbh: the 22 tasks of BIG-bench Hard" in capsys.readouterr().out
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert main(["fetch-tasks", "t0", *out, "--tasks", "imdb"]) == 2
    assert 'pip install "moerge_ext[tasks]"' in capsys.readouterr().err


def test_a_hub_that_is_not_there_is_said(tmp_path, capsys, monkeypatch):
    import datasets

    def unreachable(*_args, **_options):
        raise ConnectionError("Couldn't reach 'x' on the Hub")

    monkeypatch.setattr("moerge_ext.published.fetch.unreached", lambda: "ConnectError: no network")
    assert main(["fetch-tasks", "t0", "--output", str(tmp_path / "out"), "--no-progress"]) == 2
    assert "the hub cannot be reached (ConnectError: no network): where there is no" in capsys.readouterr().err
    monkeypatch.setattr("moerge_ext.published.fetch.unreached", lambda: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", unreachable)
    assert main(["fetch-tasks", "t0", "--output", str(tmp_path / "out"), "--no-progress"]) == 2
    assert "Couldn't reach 'x' on the Hub: where there is no hub, give copies" in capsys.readouterr().err

    def unknown(*_args, **_options):
        raise datasets.exceptions.DatasetNotFoundError("no such repository")

    monkeypatch.setattr(datasets, "load_dataset", unknown)
    assert main(["fetch-tasks", "flan", "--tasks", "snli", "--output", str(tmp_path / "out"), "--no-progress"]) == 2
    assert "no such repository" in capsys.readouterr().err and not (tmp_path / "out" / "snli").exists()


def test_the_command_writes_what_eval_reads(tmp_path, capsys):
    rows = [bigbench_row(f"Q {i}", ["b"], ["a", "b"], [0, 1]) for i in range(random.Random(0).randint(4, 4))]
    repository(tmp_path / "hub" / "tasksource" / "bigbench", {"navigate": {"train": rows, "validation": rows[:1]}})
    words = ["fetch-tasks", "bbh", "--tasks", "navigate", "--from", tmp_path / "hub", "--output", tmp_path / "out"]
    assert main([*map(str, words), "--no-progress"]) == 0
    assert (
        f"{tmp_path / 'out' / 'navigate'}: test 4\n" in capsys.readouterr().out
    )  # the row that came twice is there once
    assert main([*map(str, words), "--no-progress"]) == 0
    assert "(already there)" in capsys.readouterr().out
