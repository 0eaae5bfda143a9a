"""LoraHub: weights for a task from a few examples, without gradients."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from builders import make_tokenizer

import moerge_ext as moerge
from moerge_ext.training.encoding import Encoder, collator


@pytest.fixture
def setup(tmp_path):
    model = cases.build("llama")
    return model, cases.bank("llama", model, tmp_path)


@pytest.mark.parametrize("optimizer", ["nevergrad", "cobyla"])
def test_weights_lower_the_objective(setup, optimizer):
    pytest.importorskip("nevergrad" if optimizer == "nevergrad" else "scipy")
    model, experts = setup
    with moerge.patch(model, experts, "expert:bee"):  # the task: what this expert would say
        ids = cases.tokens(4)
        data = [{"input_ids": ids, "labels": model(ids).logits.argmax(-1).roll(1, 1)}]
    before = cases.snapshot(model)
    result = moerge.lorahub(model, experts, data, optimizer=optimizer, budget=12, progress=False)
    assert cases.same(before, cases.snapshot(model)) and len(result.history) <= 12
    assert result.weights.shape == (3,) and result.weights.abs().max() <= 1.5
    assert result.objective == min(result.history) < result.history[0]
    again = moerge.lorahub(model, experts, data, optimizer=optimizer, budget=12, progress=False)
    assert torch.equal(again.weights, result.weights)
    with moerge.patch(model, experts, "given", aggregation="factored") as handle, handle.affinities(result.weights):
        loss = model(**data[0]).loss.item()
    assert loss + 0.05 * result.weights.abs().mean().item() == pytest.approx(result.objective, rel=1e-5)
    few = moerge.lorahub(model, experts, data, count=1, budget=3, optimizer=optimizer, progress=False)
    assert (few.weights != 0).sum() <= 1


def test_rows_of_text_by_the_tokenizer(setup, tmp_path):
    model, experts = setup
    tokenizer, options = make_tokenizer(tmp_path), {"optimizer": "cobyla", "budget": 4, "progress": False}
    rows = [{"input": "abc", "target": "ca"}, {"input": "ba", "target": "abab"}]
    ready = [collator(tokenizer)(Encoder(model, tokenizer).features(rows))]
    found = moerge.lorahub(model, experts, rows, tokenizer=tokenizer, **options)
    assert torch.equal(found.weights, moerge.lorahub(model, experts, ready, **options).weights)
    with pytest.raises(ValueError, match="rows of text .*: pass tokenizer="):
        moerge.lorahub(model, experts, rows, **options)


def test_what_is_wrong_is_said(setup, monkeypatch):
    model, experts = setup
    with pytest.raises(ValueError) as caught:
        moerge.lorahub(model, experts, [], count=0, budget=0, bound=-1, l1=-1, optimizer="adam")
    assert all(word in str(caught.value) for word in ("count", "budget", "bound", "l1", "'adam'"))
    with pytest.raises(ValueError, match="data is empty"):
        moerge.lorahub(model, experts, [])
    monkeypatch.setitem(__import__("sys").modules, "nevergrad", None)
    with pytest.raises(ImportError, match=r"moerge_ext\[lorahub\]"):
        moerge.lorahub(model, experts, [{"input_ids": cases.tokens(1), "labels": cases.tokens(1)}], progress=False)
    assert not any(isinstance(m, moerge.RoutedLinear) for m in model.modules())
