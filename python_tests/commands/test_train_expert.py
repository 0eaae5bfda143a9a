"""The command that trains an expert."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import make_tokenizer
from gate_builders import (
    MODELS,
    one_thread,  # noqa: F401 (used by being here)
)

from moerge_ext.commands.main import main, parser
from moerge_ext.commands.train_expert import LORA
from moerge_ext.commands.training_options import TRAINING
from moerge_ext.experts.bank import load_experts
from moerge_ext.training import loop
from moerge_ext.training.experts import train_expert


@pytest.fixture(params=["llama"])
def base(request, tmp_path):
    """(the words that every call has, the folder of the expert)."""
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    rows = [{"input": f"copy {c}:", "target": c * 3} for c in "abcdefg"] + [{"text": "x" * 80}]
    rows = [row for row in rows if request.param != "t5" or "input" in row]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["train-expert", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "e"]
    words += ["--device", "cpu", "--no-progress", "--batch-size", 4, "--rank", 2, "--steps", 4]
    return [str(word) for word in words], tmp_path / "e"


@pytest.mark.parametrize("base", ["llama", "t5"], indirect=True)
def test_an_expert_gates_and_a_finished_run(base, capsys, recwarn):
    words, folder = base
    validation = ["--validation", words[3], "--eval-every", "2", "--alpha", "4", "--lr", "0.01"]
    assert main([*words, *validation, "--target-modules", "q_proj", "v_proj", "q", "v"]) == 0
    out = capsys.readouterr().out
    rows = len(Path(words[3]).read_text().splitlines())
    assert out.startswith(f"4 steps of up to 4 sequences (batch size 4, accumulate 1): {2 * rows} sequences in all")
    assert "validation loss" in out and out.endswith(f"wrote {folder}\n")
    bank = load_experts([folder])
    assert {path.rpartition(".")[2] for path in bank.modules} <= {"q_proj", "v_proj", "q", "v"}
    if rows == 8:
        assert "of 16 rows are longer than 64 tokens" in " ".join(str(w.message) for w in recwarn)
    again = [*words, *validation, "--target-modules", "q_proj", "v_proj", "q", "v", "--resume"]
    assert main(again) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"finished before, in 4 steps: {folder}")
    assert main(["train-gates", words[1], str(folder), "--data", words[3], "--device", "cpu", "--steps", "2"]) == 0
    assert load_experts([folder]).gate_kinds == ("sigmoid-gate",)


def test_ctrl_c_prints_the_line_that_goes_on(base, capsys, monkeypatch):
    words, folder = base
    whole = loop._Run._backward

    def interrupted(run, batch, seed):
        if seed == 2:  # of the third step
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run, batch, seed)

    monkeypatch.setattr(loop._Run, "_backward", interrupted)
    assert main(words) == 130
    said = capsys.readouterr().err
    assert "the state after step 2 is kept in" in said and "resume=True" not in said
    line = next(line for line in said.splitlines() if line.startswith("go on with: moerge train-expert"))
    monkeypatch.undo()
    assert main(line.split()[4:]) == 0 and line.endswith(" --resume")
    assert (folder / "adapter_model.safetensors").exists()


def test_what_is_wrong_is_said_before_the_model_is_read(base, capsys):
    words, _ = base
    data = words[3]
    cases = {
        "--batch-size must be at least 1, got 0; --steps must be at least 1": ["--batch-size", "0", "--steps", "0"],
        "--rank must be at least 1, got 0": ["--rank", "0"],
        "--max-length must be at least 2, got 1": ["--max-length", "1"],
        f"'{data}' is a file, in which {data}/out cannot lie: name a folder": ["--output", f"{data}/out"],
        "there is no file missing.jsonl": ["--validation", "missing.jsonl"],
    }
    for said, options in cases.items():
        assert main([words[0], "no/such-model", *words[2:], *options]) == 2
        assert said in capsys.readouterr().err


def test_the_options_are_the_functions():
    assert {*TRAINING, *LORA} < set(inspect.signature(train_expert).parameters)
    bare = parser("train-expert").parse_args(["train-expert", "m", "--data", "f", "--output", "d"])
    assert not [name for name in (*TRAINING, *LORA) if hasattr(bare, name)]


@pytest.mark.slow
def test_two_processes_share_the_rows(base):
    words, folder = base
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "moerge_ext"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes, each: 4 steps") == done.stdout.count("wrote ") == 1
    assert load_experts([folder]).modules


def test_expert_and_gates_together_from_scratch(base, capsys):
    """PHATGOOSE's appendix A by two commands, the second as the first prints it."""
    words, folder = base
    model, data = words[1], words[3]
    made = ["new-expert", model, "--output", str(folder), "--rank", "2", "--target-modules", "q_proj", "v_proj"]
    assert main(made) == 0
    line = capsys.readouterr().out.splitlines()[-1].replace("FILE", data).split()
    start = load_experts({"e": folder})
    assert all(not module.lora_B.any() for module in start.modules.values()) and len(start.modules) == 4
    assert main([*line[1:], "--device", "cpu", "--no-progress", "--steps", "3", "--batch-size", "4"]) == 0
    trained = load_experts({"e": f"{folder}-joint"})
    for path, module in trained.modules.items():
        assert module.lora_B.any() and not torch.equal(module.lora_A, start.modules[path].lora_A)
        assert module.gates["sigmoid-gate"].any()
    assert main(made) == 2 and "is there already: pass --overwrite" in capsys.readouterr().err
    assert main([*made, "--overwrite"]) == 0
    assert main([*made[:3], f"{folder}-other", "--rank", "0"]) == 2
    assert "--rank must be at least 1, got 0" in capsys.readouterr().err
