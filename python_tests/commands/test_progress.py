"""--no-progress reaches the bars of libraries, and only for the command."""

from __future__ import annotations

import io

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as auto

from moerge_ext.commands.progress import bars


def drawn(kind, **options):
    file = io.StringIO()
    for _ in kind(range(3), file=file, **options):
        pass
    return file.getvalue()


def library_bars():
    """The bars of the libraries that work for a command."""
    from huggingface_hub.utils import tqdm as hub
    from transformers.utils import logging

    return [(tqdm, {}), (auto, {}), (auto, {"disable": False}), (hub, {}), (logging.tqdm, {})]


def test_no_bar_of_any_library():
    with bars(shown=False):
        assert [drawn(kind, **options) for kind, options in library_bars()] == [""] * 5
    assert all(drawn(kind, **options) for kind, options in library_bars())
    with bars(shown=True):
        assert drawn(auto)
    with pytest.raises(KeyError), bars(shown=False):
        raise KeyError
    assert drawn(auto)


WITHOUT_BARS = {"doctor", "methods", "list", "demo"}
OF_OTHER_PROGRAMS = {"serve", "lm-eval"}


def test_every_command_with_bars_has_the_option(capsys):
    from moerge_ext.commands import main as cli

    for command in cli.COMMANDS.keys() - WITHOUT_BARS - OF_OTHER_PROGRAMS:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "--no-progress" in capsys.readouterr().out, command


def test_training_bar_shows_a_running_mean(tmp_path, monkeypatch, capsys):
    import patch_cases as cases

    import moerge_ext as moerge
    from moerge_ext.training import loop

    shown = []

    class Bar(loop.tqdm):
        def set_postfix_str(self, text, refresh=True):
            shown.append(text)

    monkeypatch.setattr(loop, "tqdm", Bar)
    model = cases.build("llama")
    rows = [cases.batch("llama", rows=1, seed=seed, labels=True) for seed in range(4)]
    done = moerge.train_expert(model, rows, tmp_path / "expert", steps=25, rank=2)
    means = [sum(done.losses[max(0, i - 20) : i]) / min(i, 20) for i in range(1, 26)]
    assert shown == [f"loss {mean:.4f}, mean of {min(i, 20)}" for i, mean in enumerate(means, 1)]
