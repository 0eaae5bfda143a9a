"""--model in every command that has a base model, and the model by place where it could always be given so."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from moerge_ext.commands import main as cli
from moerge_ext.commands.main import COMMANDS, FOREIGN, parser
from moerge_ext.commands.model_options import MODEL

OTHER = {"train-mix": "of the mixture", "train-calm": "of the model that answers", "convert": "of the base model"}


@pytest.fixture
def parsed(monkeypatch):
    """words -> what the command would run with."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr("moerge_ext.commands.main._run", lambda args: seen.append(args) or 0)

    def call(words: str) -> argparse.Namespace:
        assert cli.main(words.split()) == 0
        return seen[-1]

    return call


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {*FOREIGN, "demo", "mix"}))
def test_the_model_is_called_alike(name):
    found = parser(name)._subparsers._group_actions[0].choices[name]._actions
    models = [action for action in found if action.dest in ("model", "placed") or "--model" in action.option_strings]
    if any("--experts" in action.option_strings for action in found) or name.startswith("train-"):
        assert any("--model" in action.option_strings for action in models)
    for action in models:
        assert action.dest == "placed" or "--model" in action.option_strings
        assert OTHER.get(name, MODEL) in action.help, action.help


TRAIN = "--data x --output y"


@pytest.mark.parametrize(
    ("words", "second"),
    [
        (f"train-expert @ {TRAIN}", None),
        ("new-expert @ --output y", None),
        (f"train-routers @ --experts a b --method mole {TRAIN}", None),
        (f"train-mix @ {TRAIN}", None),
        (f"train-gates @ s {TRAIN}", "adapter"),
        (f"train-gates {TRAIN} @ s", "adapter"),
        ("train-gates @ --data x s --output y", "adapter"),
        (f"train-calm @ s {TRAIN}", "augmenting"),
        ("explain @ s --experts a b", "prompt"),
    ],
)
def test_by_place_and_by_name(parsed, words, second, capsys):
    for given in ("m", "--model m", "--model=m"):
        args = parsed(words.replace("@", given))
        assert args.model == "m" and args.rest == [] and (second is None or getattr(args, second) == "s")
    for wrong, said in (
        (words.replace("@", "m --model n"), "the model is given twice: 'm' by place, and --model 'n'"),
        (words.replace("@ ", ""), "no model is given: expected "),
        (words.replace("@", "m n o") if second else words.replace("@", "m n"), "unrecognized arguments: "),
    ):
        with pytest.raises(SystemExit):
            cli.main(wrong.split())
        assert said in capsys.readouterr().err, wrong


def test_the_home_folder(parsed):
    assert parsed(f"train-expert --model=~/m {TRAIN}").model == str(Path.home() / "m")
    assert parsed(f"train-expert ~/m {TRAIN}").model == str(Path.home() / "m")
    assert parsed("convert a b --model ~/m").base == parsed("convert a b --base ~/m").base == str(Path.home() / "m")
