"""`moerge train-calm`, and the composition in `moerge eval` and `moerge generate`'s loader."""

from __future__ import annotations

import json

import pytest
from calm_cases import anchor_and_augmenting
from gate_builders import one_thread  # noqa: F401 (used by being here)

from moerge_ext.commands.main import main
from moerge_ext.commands.train_calm import connections_of

pytestmark = pytest.mark.filterwarnings("ignore")


def test_compose_train_and_evaluate(tmp_path, capsys):
    paths = anchor_and_augmenting(tmp_path)[2]
    rows = [{"input": f"copy {c}:", "target": c * 2} for c in "abcdefgh"]
    task = tmp_path / "task"
    task.mkdir()
    (task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task / "meta.json").write_text(json.dumps({"task": "copy", "split": "train", "metric": "exact_match"}))
    made = tmp_path / "calm"
    words = ["train-calm", *map(str, paths.values()), "--data", str(task / "test.jsonl"), "--output", str(made),
             "--steps", "3", "--no-progress", "--device", "cpu", "--heads", "4"]  # fmt: skip

    def refused(message, *more):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err and not made.exists()

    refused("connections must be from 1 to 3")  # 4 are the default
    refused("--connections takes a number, or pairs such as 3:1 7:3, got 1:x", "--connections", "1:x")
    assert main([*words, "--connections", "1:0", "3:2"]) == 0
    assert "loss " in capsys.readouterr().out and (made / "config.json").is_file()
    assert main([*words, "--connections", "1:0", "3:2", "--resume"]) == 0
    assert "finished before" in capsys.readouterr().out
    evaluated = [
        "eval",
        "--overwrite",
        "--tasks",
        str(task),
        "--limit",
        "3",
        "--no-progress",
        "--output",
        str(tmp_path / "eval"),
    ]
    assert main([*evaluated, "--model", str(paths["anchor"]), "--methods", f"base,model:{made}"]) == 0
    assert main([*evaluated, "--model", str(made), "--methods", "base", "--output", str(tmp_path / "alone")]) == 0
    (file,) = (tmp_path / "alone" / "answers" / "copy").glob("base*")
    (other,) = (file for file in (tmp_path / "eval" / "answers" / "copy").iterdir() if "model" in file.name)
    alone, row = ([json.loads(line)["answer"] for line in f.read_text().splitlines() if "answer" in json.loads(line)]
                  for f in (file, other))  # fmt: skip
    assert alone == row and len(alone) == 3


def test_connections():
    assert connections_of(["4"]) == 4 and connections_of(["3:1", "7:3"]) == [(3, 1), (7, 3)]
