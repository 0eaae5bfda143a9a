"""A method's own top_k is for many experts; with fewer it takes all, and says so."""

from __future__ import annotations

import warnings

import patch_cases as cases
import pytest
import torch

import moerge_ext as moerge


@pytest.mark.parametrize("method", ["arrow", "arrow_mttl", "arrow_peft", "phatgoose"])
@pytest.mark.parametrize("count", [1, 2])
def test_all_are_taken_and_it_is_said(tmp_path, method, count):
    model = cases.build("llama")
    experts = moerge.load_experts(cases.bank("llama", model, tmp_path).folders[:count])
    inputs = {"input_ids": cases.tokens(1, 5)}
    top_k = moerge.get_method(method).routing.top_k
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with moerge.patch(model, experts, method):
            own = cases.logits(model, **inputs)
    said = [str(w.message) for w in caught if f"'{method}' takes the top {top_k} by itself" in str(w.message)]
    assert bool(said) == (top_k > count)
    with moerge.patch(model, experts, method, top_k=count):
        assert torch.equal(cases.logits(model, **inputs), own)
    with pytest.raises(ValueError, match=f"top_k={count + 1} is more than the number of experts, E={count}"):
        moerge.patch(model, experts, method, top_k=count + 1)
