"""What the shell says of the library's messages."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import llama

import moerge_ext
from moerge_ext.commands.main import main
from moerge_ext.commands.wording import plain_warnings, said

ROOT = Path(moerge_ext.__file__).parent
# words of Python: an argument with its value, a call, a constant
PYTHON = re.compile(
    r"""(?<![\w/<{"'.-])[a-z_]+=(?:True|False|None|\[|\{|"|'|\.\.\.|torch)|(?<!')\b(?:None|True|False)\b(?!')"""
    r"""|\bmoerge_ext\.\w+|\b(?:load_experts|patch)\("""
)
# messages of what no command does
IN_PYTHON = (
    "the model is PEFT's", "was not loaded from a folder", "is of the hub's cache", "cannot be folder names",
    "take it off:", "no layer of the model carries this adapter", "choose the experts with --names if it is none",
    "need handle=patch", "are for sample=", "From Python it works", "the model is patched already",
    "a judge must answer", "needs a checkpoint_dir", "so that no layer is patched", "in Python", "need answerers=",
    "expected a writer (", "save the adapter again from", "without spare slots", "model and experts are swapped:",
    "must be an ExpertBank", "takes the number of sequences in a batch", "is no composition", "<div ",
    "which reentrant gradient checkpointing drops",
)  # fmt: skip


def messages():
    """(where, text) of every message that is raised, warned of or listed, f-strings with X for their parts."""
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).parts[0] in ("demo", "ops", "serving") or path.name == "harness.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for call in calls:
            name = ast.unparse(call.func).rpartition(".")[2]
            if not name.endswith("Error") and name not in ("warn", "append", "add_note", "error"):
                continue
            for node in ast.walk(call):
                if isinstance(node, ast.JoinedStr):
                    yield (
                        f"{path.name}:{node.lineno}",
                        "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values),
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                    yield f"{path.name}:{node.lineno}", node.value


def test_no_message_of_a_command_begins_with_a_function():
    functions = {*moerge_ext.__all__} - {*moerge_ext.METHODS}  # a method's name is the shell's as well
    begins = re.compile(rf"(^|: )(?:{'|'.join(sorted(functions))}): ")
    left = {where: text for where, text in messages() if begins.search(said(text))}
    assert not left, json.dumps(left, indent=1)


def test_no_message_of_a_command_speaks_python():
    shown = {where: re.sub(r"--option \S+", "", said(text)) for where, text in messages()}
    found = {where: text for where, text in shown.items() if PYTHON.search(text)}
    left = {where: text for where, text in found.items() if not any(known in text for known in IN_PYTHON)}
    assert not left, json.dumps(left, indent=1)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("resume=True (--resume) goes on from it", "--resume goes on from it"),
        ("pass data (--data) of other rows (--tasks: a there)", "pass --data of other rows (--tasks: a there)"),
        ("say where to write (output_dir, --output DIR)", "say where to write (--output DIR)"),
        ("load_experts(..., rename={'a.b': 'c'}) if it is", "--rename a.b=c if it is"),
        ("load_experts(..., rename={'': 'anchor'}) if it is", "--rename =anchor if it is"),
        (
            "call calibrate_threshold(router, held_in_queries), or pass threshold=...",
            "pass the option threshold (`moerge eval --calibrate DIR` finds one)",
        ),
        ('patch(..., missing="drop") leaves it out', "--missing drop leaves it out"),
        ("E=2: pass top_k=2, or None for all", "E=2: pass --top-k 2, or all"),
        ("a number in (0, 1] or None, got 'None'", "a number in (0, 1] or none, got 'None'"),
        ("batch_size must be at least 1; x/batch_size.py", "--batch-size must be at least 1; x/batch_size.py"),
        (
            "load_experts: 1 of 2 experts cannot be used:\n  - expert 'a'",
            "1 of 2 experts cannot be used:\n  - expert 'a'",
        ),
        ("patch: one expert is alone", "one expert is alone"),
        ("multitask: load_experts: rename has 'x', which", "multitask: --rename has 'x', which"),
        ("load_experts: no expert named x; there are y", "--names: no expert named x; there are y"),
        ("load_experts: gates for 'x', which is no expert here", "--gates for 'x', which is no expert here"),
        ("pass its id on the hub (base_model=ID, --base-model ID)", "pass its id on the hub (--base-model ID)"),
        ("limit must be at least 1, got 0", "--limit must be at least 1, got 0"),
        ("by `moerge train-gates` or moerge_ext.train_gates(m, f)", "by `moerge train-gates`"),
    ],
)
def test_words(text, shown):
    assert said(text, ["batch_size", "model", "routers"]) == shown


def test_a_command_without_routers_takes_them_as_an_option():
    text = "then routers=FILE (--routers FILE)"
    assert said(text, ["routers"]) == "then --routers FILE"
    assert said(text, ["option"]) == "then --option routers=FILE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wording")
    model = llama()
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "model")
    random_experts(model, folder, ["a"], ["q_proj"])
    random_experts(model, folder, ["b"], ["q_proj", "v_proj"], seed=1)
    return folder


def generate(folder, *more) -> int:
    words = [
        "generate",
        "a:",
        "--model",
        folder / "model",
        "--experts",
        folder / "a",
        folder / "b",
        "--max-new-tokens",
        2,
    ]
    return main([*map(str, words), *map(str, more), "--no-progress"])


def test_the_ways_out_are_flags_that_are_there(folder, capsys, tmp_path):
    """What experts and model that do not fit are told to do, done."""
    other = llama()
    for layer in other.model.layers:
        layer.self_attn.w_proj = layer.self_attn.v_proj
        del layer.self_attn.v_proj
    random_experts(other, tmp_path, ["c"], ["q_proj", "w_proj"])
    words = ("--experts", tmp_path / "c", "--method", "arrow", "--top-k", "1")
    assert generate(folder, *words) == 2
    told = capsys.readouterr().err
    assert "--missing drop leaves such modules out, --modules PATTERN takes the others" in told
    assert "--rename old=new if" in told and not re.search(r"load_experts|patch\(|missing=", told)
    for more in (["--missing", "drop"], ["--modules", "q_proj"], ["--names", "a", "b"], ["--rename", "w_proj=v_proj"]):
        assert generate(folder, *words, *more) == 0, more
        capsys.readouterr()
    assert generate(folder, *words, "--names", "nobody") == 2
    assert "no expert named nobody; there are a, b, c" in capsys.readouterr().err


def test_warnings_are_lines_without_code(folder):
    """In a process of its own: pytest has its own way with warnings."""
    words = ["generate", "a:", "--model", folder / "model", "--experts", folder / "a", folder / "b", "--top-k", "2"]
    words += ["--max-new-tokens", "2", "--no-progress"]
    done = subprocess.run(
        [sys.executable, "-m", "moerge_ext", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        timeout=600,
    )
    theirs = "Setting `pad_token_id` to `eos_token_id`"  # transformers 5.0, as a line of its own
    lines = [line for line in done.stderr.splitlines() if not line.startswith(theirs)]
    assert done.returncode == 0 and all(line.startswith("warning: ") for line in lines), done.stderr
    assert any("one expert is alone" in line and "--absent base lets" in line for line in lines), done.stderr
    assert "warnings.warn" not in done.stderr and ".py:" not in done.stderr


def test_a_hint_at_an_option_that_is_not_there_and_a_list_without_its_head():
    text = "x\n(names=[...] loads the others without them)"
    assert said(text, ["names"]) == "x\n(--names NAME ... loads the others without them)"
    assert said(text, ["experts"]) == "x"
    text = "call calibrate_threshold(router, held_in_queries), or pass threshold=..."
    assert said(text, ["calibrate"]) == "pass --calibrate DIR, or the option threshold"
    assert said(text, ["option"]).startswith("pass --option threshold=T (`moerge eval")
    with plain_warnings():
        shown = warnings.formatwarning
        assert shown("load_experts: \n  - expert 'a': x", UserWarning, "", 1) == "warning: expert 'a': x\n"
        many = "load_experts: \n  - expert 'a': x\n  - expert 'b': y"
        assert shown(many, UserWarning, "", 1) == "warning: of the experts:\n  - expert 'a': x\n  - expert 'b': y\n"


def test_warnings_are_as_before_afterwards(recwarn):
    before = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("x", UserWarning, "f.py", 1) == "warning: x\n"
        warnings.warn("recorded all the same", stacklevel=1)
    assert warnings.formatwarning is before and "recorded all the same" in str(recwarn.list[0].message)
