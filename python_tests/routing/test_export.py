"""Patched models through torch.export, with a length that is not fixed."""

from __future__ import annotations

import builders
import guard_cases as cases
import pytest
import torch
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.ops import reference


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("method", ["merged", "merged_factors", "expert:ant", "phatgoose"])
@torch.no_grad()
def test_any_length(method, backend):
    model = builders.tiny_llama()
    paths = [f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")]
    with moerge.patch(model, cases.experts(model, paths), method, backend=backend):
        lengths = {1: torch.export.Dim("length", min=2, max=64)}
        program = torch.export.export(
            Logits(model), (cases.ids(2, 6),), dynamic_shapes=(lengths,), strict=False
        ).module()
        for length in (3, 9):
            want = model(cases.ids(2, length)).logits
            assert torch.allclose(program(cases.ids(2, length)), want, atol=1e-5)


def test_the_reference_exports_without_a_stable_sort(monkeypatch):
    """ONNX has none."""

    class Route(nn.Module):
        def forward(self, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
            return reference.route(x, gates, top_k=3, top_p=0.9)

    x, gates = torch.randn(6, 8), torch.randn(5, 8)
    gates[2] = gates[1]  # a tie
    program = torch.export.export(Route(), (x, gates))
    assert not any("sort" in str(node.target) for node in program.graph.nodes)
    for got, want in zip(program.module()(x, gates), Route()(x, gates), strict=True):
        assert torch.equal(got, want)
