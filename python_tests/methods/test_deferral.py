"""Co-LLM's equations against numbers by hand, and what its row refuses."""

from __future__ import annotations

import math

import patch_cases as cases
import pytest
import torch

import moerge_ext as moerge
from moerge_ext.methods.deferral import log_choice, marginal_loss, speakers, weak_labels, weak_loss


def test_with_one_expert_the_gate_is_the_papers_sigmoid():
    theta, hidden = torch.tensor([[0.5, -1.0]]), torch.tensor([[2.0, 0.25], [-4.0, 1.0]])
    chances = log_choice(theta, hidden).exp()
    want = [1 / (1 + math.exp(-0.75)), 1 / (1 + math.exp(3.0))]
    assert chances[:, 1].tolist() == pytest.approx(want, rel=1e-6)
    assert chances.sum(-1).tolist() == pytest.approx([1.0, 1.0])
    assert speakers(chances.log(), 0.5).tolist() == [1, 0] and speakers(chances.log(), 0.7).tolist() == [0, 0]
    log_probs = torch.tensor([[0.1, 0.6], [0.3, 0.9]]).log()
    p = [want[0] * 0.6 + (1 - want[0]) * 0.1, want[1] * 0.9 + (1 - want[1]) * 0.3]
    assert marginal_loss(theta, hidden, log_probs).item() == pytest.approx(-math.log(p[0] * p[1]) / 2, rel=1e-5)
    labels = torch.tensor([1, 0])
    weak = -(8 * math.log(want[0]) + math.log(1 - want[1])) / 2  # BCELoss with a weight of 8 for the deferred
    assert weak_loss(theta, hidden, labels, 8.0).item() == pytest.approx(weak, rel=1e-5)


def test_of_several_experts_the_likeliest_writes_once_the_base_is_unlikely():
    chances = torch.tensor([[0.4, 0.25, 0.35], [0.3, 0.6, 0.1]]).log()
    assert speakers(chances, 0.5).tolist() == [2, 1], "0.6 is deferred, though no expert is likelier than the base"
    assert speakers(chances, 0.65).tolist() == [0, 1] and speakers(chances, 1.0).tolist() == [0, 0]


def test_weak_labels_are_of_experts_that_are_right_where_the_base_is_not():
    right = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    log_probs = torch.tensor([[-1, -2, -3], [-3, -2, -1], [-1, -0.5, -2], [-1, -1, -1], [-9, -5, -1.0]])
    assert weak_labels(right, log_probs).tolist() == [0, 2, 2, 0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 1.5}, "threshold must be in"),
        ({"threshold": True}, "threshold must be in"),
        ({"init_steps": -1}, "init_steps must be an integer from 0"),
        ({"init_weight": 0}, "init_weight must be a positive number"),
        ({"top_k": 2}, "unknown option"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        moerge.get_method("co_llm").configure(**options)


def test_no_layer_is_patched(tmp_path):
    model = cases.build("llama")
    before = cases.snapshot(model)
    with pytest.raises(ValueError, match="chooses among whole models at every token.*moerge_ext.CoLLM"):
        moerge.patch(model, cases.bank("llama", model, tmp_path), "co_llm")
    assert cases.same(before, cases.snapshot(model))
