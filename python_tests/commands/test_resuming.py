"""A run that cannot be resumed with these arguments is refused before a model is read, and one that can goes on."""

from __future__ import annotations

import json

import pytest
from builders import make_tokenizer, random_experts
from gate_builders import (
    llama,
    one_thread,  # noqa: F401 (used by being here)
)

from moerge_ext.commands import main as cli

pytestmark = pytest.mark.filterwarnings("ignore")

DATA = "--data rows.jsonl --device cpu --no-progress --batch-size 4"
COMMANDS = {
    "train-expert": f"train-expert model {DATA} --output e --rank 2",
    "train-gates": f"train-gates model a {DATA} --output g",
    "train-routers": f"train-routers model --experts a b --method mole {DATA} --output r",
}
OWN = {"train-expert": "--rank 3", "train-gates": "--joint", "train-routers": "--balance 0.25"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    model = llama()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer(tmp_path / "model")
    random_experts(model, tmp_path, ["a", "b"], ["q_proj"])
    for name, letters in (("rows", "abcdef"), ("other", "abcdeg")):
        rows = [{"input": f"copy {c}:", "target": c} for c in letters]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopped(monkeypatch, words: str) -> None:
    """The run, as Ctrl-C ends it after its third step."""
    from moerge_ext.training import loop

    done, evaluate = [], loop._Run._evaluate_when_due

    def third(run):
        evaluate(run)
        done.append(run.state.step)
        if run.state.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "_evaluate_when_due", third)
        assert cli.main(f"{words} --steps 4".split()) == 130
    assert done[-1] == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_other_settings_are_refused_before_a_model_is_read(folder, monkeypatch, capsys, name):
    pytest.importorskip("peft")
    words = COMMANDS[name]
    stopped(monkeypatch, words)
    with monkeypatch.context() as patched:
        patched.setattr(
            "transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("the model was read")
        )
        for more, said in (
            ("--steps 5", "steps: saved with 4, now 5"),
            ("--steps 4 --lr 0.5", "lr: saved with"),
            ("--steps 4 --batch-size 2", "--batch-size: saved with 4, now 2"),
            (f"--steps 4 {OWN[name]}", f"{OWN[name].split()[0].removeprefix('--')}: saved with"),
            ("--steps 4 --validation other.jsonl", "validation: saved with"),
            ("--steps 4 --data other.jsonl", "data: the rows, or how they are put and cut"),
            ("--steps 4 --max-length 3", "data: the rows, or how they are put and cut"),
        ):
            assert cli.main(f"{words} {more} --resume".split()) == 2, more
            told = capsys.readouterr().err
            assert said in told and "belongs to another run; leave out --resume (or delete " in told, told
    assert cli.main(f"{words} --steps 4 --resume".split()) == 0
    assert "in 4 steps" in capsys.readouterr().out
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("read"))
    assert cli.main(f"{words} --steps 5 --resume".split()) == 2
    assert "is there already, of other settings (steps: saved with 4, now 5): pass" in capsys.readouterr().err
