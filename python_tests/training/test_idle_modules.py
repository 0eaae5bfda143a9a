"""Modules of an expert that do not run while its gates are made: no gate is written, and `patch` masks them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from builders import write_adapter
from gate_builders import (
    Killed,
    breaking,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from torch import nn

import moerge_ext as moerge
from moerge_ext.experts.gates import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.gated_lora import gated_model
from moerge_ext.training.gates import train_gates

WIDTH = 4


class TwoTowers(nn.Module):
    """Text always runs, pictures where there are some; `stale` never; `cut` runs and no loss depends on it."""

    def __init__(self):
        super().__init__()
        self.text, self.picture, self.stale, self.cut = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, picture=None, labels=None):
        y = self.text(x)
        if picture is not None:
            y = y + self.picture(picture)
        self.cut(x.detach()).detach()
        return SimpleNamespace(loss=(y - labels).square().mean() if labels is not None else None, y=y)


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TwoTowers().eval()


def write(folder, paths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return write_adapter(folder, {path: (draw(2, WIDTH), draw(WIDTH, 2)) for path in paths}, r=2, alpha=2)


def batch(picture=False, rows=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(rows, 5, WIDTH, generator=generator)  # noqa: E731
    return {"x": draw(), "labels": draw()} | ({"picture": draw()} if picture else {})


ALL = ["text", "picture", "stale", "cut"]


def test_gates_of_modules_that_did_not_run_are_left_out_and_named(tmp_path):
    folder = write(tmp_path / "a", ALL)
    with pytest.warns(UserWarning, match="3 of 4 modules of 'a'.*: cut, picture, stale$"):
        train_gates(build(), folder, [batch()], **quiet())
    gates = read_gates(folder)["sigmoid-gate"].gates
    assert gates.keys() == {"text"} and gates["text"].any()
    with pytest.warns(UserWarning, match="2 of 4 modules of 'a'.*: cut, stale$"):
        train_gates(build(), folder, [batch(), batch(picture=True)], **quiet())
    assert read_gates(folder)["sigmoid-gate"].gates.keys() == {"text", "picture"}


def test_gates_of_zero_cannot_win_the_validation(tmp_path):
    """They would score 0 for every token, also when no step is better than none; that is said."""
    folder = write(tmp_path / "a", ["text"])
    far = [{**batch(), "labels": -batch()["labels"]}]
    with pytest.warns(
        UserWarning, match=r"gates of a: validation loss .* at the best step, \d, was .* before the first"
    ):
        result = train_gates(build(), folder, [batch()], validation=far, eval_every=2, **quiet(lr=100.0))
    trained = {step: loss for step, loss in result.validation.items() if step}
    assert min(trained.values()) > result.validation[0]
    assert result.best_step == min(trained, key=trained.get) > 0
    assert read_gates(folder)["sigmoid-gate"].gates["text"].any()


@pytest.mark.parametrize("paths", [["stale"], ["cut"], ["stale", "cut", "picture"]])
def test_an_error_when_nothing_is_reached(paths, tmp_path):
    folder = write(tmp_path / "a", paths)
    with pytest.raises(ValueError, match=f"gates of a: .*none of {len(paths)} parameters has a gradient.*{paths[0]}"):
        train_gates(build(), folder, [batch()], **quiet())
    assert read_gates(folder) == {}


def test_a_batch_without_the_module_between_others(tmp_path):
    folder = write(tmp_path / "a", ["picture"])
    result = train_gates(build(), folder, [batch(picture=True), batch()], **quiet())
    assert len(result.losses) == 6 and read_gates(folder)["sigmoid-gate"].gates["picture"].any()


def test_resuming_a_run_knows_what_ran_before_the_break(tmp_path):
    folder, data = write(tmp_path / "a", ["text", "picture"]), [batch(picture=True), batch()]
    with pytest.raises(Killed):
        train_gates(build(), folder, breaking(data, after=6), checkpoint_every=1, **quiet(steps=7))
    train_gates(build(), folder, [batch()], resume=True, **quiet(steps=7))
    assert read_gates(folder)["sigmoid-gate"].gates.keys() == {"text", "picture"}


def test_a_loop_of_ones_own(tmp_path):
    folder = write(tmp_path / "a", ALL[:3])
    model = build()
    with gated_model(model, folder) as gated:
        model(**batch()).loss.backward()
        with pytest.warns(UserWarning, match="2 of 3 modules .*: picture, stale$"):
            gated.save()
        gated.restore({f"{path}/gate": torch.ones(WIDTH) for path in ALL[:3]})
        gated.save()  # what somebody has set is written
    assert read_gates(folder)["sigmoid-gate"].gates.keys() == set(ALL[:3])
    with gated_model(model, folder) as gated, pytest.warns(UserWarning, match="no gate of 'a' was trained: all"):
        gated.save()  # nothing was run at all: as they are


def test_average_activation_leaves_them_out_as_well(tmp_path):
    folder = write(tmp_path / "a", ALL)
    with pytest.warns(UserWarning, match="2 of 4 modules of 'a'.*: picture, stale$"):
        average_activation(build(), folder, [batch()], progress=False)
    assert read_gates(folder)["average-activation"].gates.keys() == {"text", "cut"}
    folder = write(tmp_path / "b", ["stale"])
    with pytest.raises(ValueError, match="stale: saw no token"):
        average_activation(build(), folder, [batch()], progress=False)


def test_a_module_without_gate_is_masked_not_zero(tmp_path):
    folders = [write(tmp_path / name, ["text", "picture"], seed) for seed, name in enumerate("ab", 1)]
    with pytest.warns(UserWarning, match="1 of 2 modules of 'a'"):
        train_gates(build(), folders[0], [batch()], **quiet())
    train_gates(build(), folders[1], [batch(picture=True)], **quiet())
    model, inputs = build(), batch(picture=True)
    with moerge.patch(model, moerge.load_experts(folders), "phatgoose", top_k=2), torch.no_grad():
        assert model.text.mask is None and model.picture.mask.tolist() == [False, True]
        got = model.picture(inputs["picture"])
    adapter = moerge.load_experts(folders[1]).modules["picture"]
    with torch.no_grad():
        alone = inputs["picture"] @ adapter.lora_A[0].T @ adapter.lora_B[0].T
        torch.testing.assert_close(got, model.picture(inputs["picture"]) + alone)


def test_experts_that_are_all_masked_leave_the_base(tmp_path):
    folders = [write(tmp_path / name, ["text", "picture"], seed) for seed, name in enumerate("ab", 1)]
    for folder in folders:
        with pytest.warns(UserWarning, match="1 of 2 modules"):
            train_gates(build(), folder, [batch()], **quiet())
    model, picture = build(), batch(picture=True)["picture"]
    expected = model.picture(picture)
    with moerge.patch(model, moerge.load_experts(folders), "phatgoose"):
        assert torch.equal(model.picture(picture), expected)


def test_an_expert_with_no_gate_at_all_is_refused(tmp_path):
    folders = [write(tmp_path / name, ["text"], seed) for seed, name in enumerate("ab", 1)]
    train_gates(build(), folders[0], [batch()], **quiet())
    experts = moerge.load_experts(folders)
    with pytest.raises(ValueError, match="missing for 1 of 2: 'b'"):
        moerge.patch(build(), experts, "phatgoose")
    experts.set_gates("b", {"text": torch.ones(WIDTH)})
    moerge.patch(build(), experts, "phatgoose").remove()
