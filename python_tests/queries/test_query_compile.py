"""Routing by the query's text under torch.compile and a static cache: new queries, the same graph."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from query_cases import described, fake_embedder, fake_writer

import moerge_ext as moerge

WORDS = ("flying", "digging", "purring")
ROUNDS = 10  # more than the recompilations that dynamo allows


@pytest.fixture
def routed(tmp_path):
    """(a model of one layer, its handle), GLIDER with a router; dynamo's state is fresh."""
    model = cases.build("llama")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    experts = described(cases.builders.random_experts(model, tmp_path, cases.NAMES, cases.DECODER))
    handle = moerge.patch(model, experts, "glider_code", alpha=1000)
    handle.router = moerge.QueryRouter(experts, fake_embedder(), fake_writer())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield model, handle
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def queries(i: int) -> list[str]:
    return [WORDS[i % 3], WORDS[(i + 1) % 3]]


def test_compiled_forward_follows_the_queries(routed):
    model, handle = routed
    compiled, inputs = torch.compile(model, fullgraph=True, backend="eager"), cases.batch("llama", rows=2)
    seen = []
    for i in range(ROUNDS):
        with handle.queries(queries(i)):
            seen.append(cases.logits(compiled, **inputs))
            assert cases.error(seen[-1], cases.logits(model, **inputs)) < 1e-6
    assert not torch.equal(seen[0], seen[1]) and graphs() <= 2
    # dynamo wraps the ValueError
    with handle.queries(WORDS[:2]), pytest.raises(RuntimeError, match="batch of 3: give as many queries"):
        compiled(cases.tokens(3))


def test_static_cache_follows_the_queries(routed):
    from transformers import CompileConfig

    model, handle = routed
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    inputs, seen = cases.batch("llama", rows=2), []
    for i in range(ROUNDS):
        with handle.queries(queries(i)):
            seen.append(model.generate(**inputs, **options, cache_implementation="static", compile_config=config))
            assert torch.equal(seen[-1], model.generate(**inputs, **options))
    assert len({tuple(row) for row in torch.cat(seen).tolist()}) > 2 and graphs() == 1
