"""Experts that --experts names, and hints at options that a command has."""

from __future__ import annotations

import json

import builders
import pytest

from moerge_ext.commands import main as cli
from moerge_ext.commands.expert_options import left_out_note, renames
from moerge_ext.commands.meaning import meant
from moerge_ext.commands.named_dirs import named_dirs
from moerge_ext.commands.wording import said as said_by_shell


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and two experts of one name."""
    root = tmp_path_factory.mktemp("named")
    model = builders.tiny_llama()
    model.save_pretrained(root / "model")
    builders.random_experts(model, root, ["cat"], ["q_proj"])
    builders.random_experts(model, root / "other", ["cat"], ["q_proj"], seed=1)
    return root


def refused(capsys, *words) -> str:
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_folders_some_of_which_have_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named_dirs(["x/cat", "a=b"], "--experts", str) == ["x/cat", "a=b"]
    assert named_dirs(["x/cat", "dog=y/cat", "a=b"], "--experts", str.upper) == {
        "X/CAT": "x/cat",
        "dog": "y/cat",
        "A=B": "a=b",
    }
    for texts in (["a="], ["=c"]):
        with pytest.raises(ValueError, match=r"--experts takes \[NAME=\]DIR, got"):
            named_dirs(texts, "--experts", str)


def test_two_experts_of_one_name_are_named_apart(folders, capsys):
    pair = ["--experts", folders / "cat", folders / "other" / "cat"]
    named = ["--experts", folders / "cat", f"tom={folders / 'other' / 'cat'}"]
    served = ["serve", "--engine", "vllm", "--check", "--model", folders / "model", "--method"]
    assert "2 experts have this name" in (said := refused(capsys, *served, "arrow", *pair))
    assert "name one of them, --experts NAME=DIR" in said
    assert cli.main([str(word) for word in [*served, "expert:tom", *named]]) == 0
    merged = ["merge", "--output", folders / "merged", "--no-progress"]
    assert cli.main([str(word) for word in [*merged, *named, "--weight", "cat=1", "--weight", "tom=0.5"]]) == 0
    assert "are both called 'tom'" in refused(capsys, *served, "arrow", *named, f"tom={folders / 'cat'}")


def test_a_named_expert_means_its_folder(folders, monkeypatch):
    monkeypatch.chdir(folders)
    assert meant({"experts": ["tom=cat", "cat"]}) == {"experts": [f"tom={folders / 'cat'}", str(folders / "cat")]}


def test_a_rename_of_the_start_of_every_path():
    assert renames(["=anchor", "model.layers=h", "wrapped="]) == {"": "anchor", "model.layers": "h", "wrapped": ""}
    for texts in (["model"], ["="], ["a=b", "a=c"]):
        with pytest.raises(ValueError, match="--rename"):
            renames(texts)


def test_the_hint_at_names_is_where_they_are(folders, capsys, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    pair = ["--experts", folders / "cat", tmp_path / "bad"]
    for words in (
        ["merge", "--output", tmp_path / "merged"],
        ["serve", "--engine", "vllm", "--check", "--model", folders / "model", "--method", "arrow"],
    ):
        assert "(--names NAME ... loads the others without them)" in refused(capsys, *words, *pair)
        assert cli.main([str(word) for word in [*words, *pair, "--names", "cat"]]) == 0


def test_an_expert_that_names_leaves_out_is_said(folders, capsys):
    two = ["--experts", folders / "cat", f"tom={folders / 'other' / 'cat'}"]
    served = ["serve", "--engine", "vllm", "--check", "--model", folders / "model", *two, "--method"]
    for method in ("expert:tom", "expert:dog"):
        said = refused(capsys, *served, method, "--names", "cat")
        assert said.endswith("\n(--names leaves out tom)\n") == (method == "expert:tom")
        assert "--names leaves out" not in refused(capsys, *served, "expert:dog")
    merged = ["merge", "--output", folders / "left", *two, "--names", "cat"]
    assert "(--names leaves out tom)" in refused(capsys, *merged, "--weight", "cat=1", "--weight", "tom=1")
    assert "--names has cat more than once" in refused(capsys, *merged, "--names", "tom", "cat")
    assert not (folders / "left").exists()


def test_names_are_said_in_words_of_the_shell():
    assert said_by_shell("x: names=['a b', 'c'] (--names 'a b' c) loads those") == "x: --names 'a b' c loads those"
    assert left_out_note("no expert 'a'; there are b", {"names": ["b"], "experts": ["x/a", "b"]})
    assert not left_out_note("there is no place, a folder", {"names": ["b"], "experts": ["x/a", "b"]})


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("serve --model m --experts a --trace 3 --host 0.0.0.0 --no-requests", "(--trace is no option, --traces is)"),
        ("serve --model m --experts a --host 0.0.0.0 --no-requests --port 80", "DIR -- --host 0.0.0.0 --port 80\n"),
        ("generat hi", "moerge: error: there is no command 'generat': did you mean generate?\n"),
        ("xyz hi", "invalid choice: 'xyz' (choose from "),
        ("--versio", "moerge: error: unrecognized arguments: --versio (--versio is no option, --version is)\n"),
        ("--model m generate hi", "unrecognized arguments: --model; the command comes first, its options behind it\n"),
        ("list a --sorted", "unrecognized arguments: --sorted\n"),
        ("merge --experts a --output o --modles x", "(--modles is no option, --modules is)"),
        ("merge --experts a --outpt o --output o", "(--outpt is no option, --output is)"),
        ("inspect --model m --experts a --tasks t --method arrow", "(--method is no option, --methods is)"),
        (
            "train-expert m --output o --data d --num-epochs 3",
            "(--num-epochs is no option, --steps is, optimizer steps, not passes over the data)",
        ),
        (
            "train-router --model m --prompts p --data d --output o --num-epochs 3",
            "(--num-epochs is no option, --epochs is)",
        ),
        ("train-expert m --output o --data d --save-steps 9", "(--save-steps is no option, --checkpoint-every is)"),
        (
            "train-expert m --output-dir o --train-file=d",
            "required: --output, --data (--output-dir is no option, --output is; ",
        ),
        ("generate hi --base m", "required: --model (--base is no option, --model is)"),
        (
            "generate --prompt hi --model m",
            "(--prompt is no option, --prompts is, a file of them; one prompt stands in",
        ),
        ("generate hi --model m --top-p 0.9", "unrecognized arguments: --top-p 0.9\n"),
        ("train-expert m --output o --data d --lora-r=8", "(--lora-r is no option, --rank is)"),
    ],
)
def test_options_are_not_abbreviated_and_the_one_that_was_meant_is_said(words, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2 and hint in capsys.readouterr().err
