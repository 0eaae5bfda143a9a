"""The options of the ops: one list for wrappers, reference, gradients and the schemas of csrc/ops.cpp."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from moerge_ext import ops, reference
from moerge_ext.ops.options import APPLY, BRANCH, ROUTE, TENSORS, filled

TABLES = {
    "route": ROUTE,
    "lora_apply": APPLY,
    "lora_apply_": APPLY,
    "routed_lora": BRANCH,
    "routed_lora_": BRANCH,
    "routed_lora_ways": BRANCH,
    "routed_linear": BRANCH,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_schema_has_the_same_options_in_the_same_order(name):
    arguments = getattr(torch.ops.moerge, name).default._schema.arguments
    options = {a.name: a.default_value for a in arguments if a.has_default_value()}
    assert list(options.items()) == list(TABLES[name].items())
    assert {a.name for a in arguments if a.name in options and "Tensor" in str(a.type)} == TENSORS & options.keys()


def test_the_kernels_say_which_they_are(request):
    """On the CPU there is one way; the CUDA kernels say what speaks against the faster ones."""
    base, x, gates = torch.randn(32, 24), torch.randn(32, 16), torch.randn(4, 16)
    bank = torch.randn(4, 8, 16), torch.randn(4, 24, 8)
    said = ops.routed_lora_ways(base, x, gates, *bank)
    if not request.config.getoption("--simt") and not request.config.getoption("--cuda"):
        assert len(said) == 1 and re.fullmatch("kernels for (avx512( with (amx|bf16))?|avx2|portable)", said[0])
    else:
        assert said[0] == "several launches: it is for 1 to 16 tokens" and said[1] == "scores: tensor cores"
        assert said[2] == "shrink: no tensor cores: the factors are not of 16 bits"
        half = [t.half() for t in (base, x)], [t.half() for t in bank]
        assert ops.routed_lora_ways(*half[0], gates, *half[1])[2] == "shrink: tensor cores"
        assert ops.routed_lora_ways(*(t[:1] for t in half[0]), gates, half[1][0].mT.contiguous().mT, half[1][1]) == [
            "several launches: the experts are of another type than the tokens, or not laid out rank by rank",
            "scores: tensor cores",
            "shrink: tensor cores",
            "expand: tensor cores",
        ]
    with pytest.raises(ValueError, match="routed_lora_ways: top_k must be"):
        ops.routed_lora_ways(base, x, gates, *bank, top_k=9)


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("name", [name for name in TABLES if name != "routed_lora_ways"])
def test_help_shows_the_options(name, module):
    shown = inspect.signature(getattr(module, name)).parameters
    named = {key: p.default for key, p in shown.items() if p.kind is p.KEYWORD_ONLY}
    assert named == TABLES[name] and not any(p.kind is p.VAR_KEYWORD for p in shown.values())


def test_the_docstrings_say_what_each_option_means():
    for function, table in ((ops.route, ROUTE), (ops.lora_apply, APPLY)):
        assert all(f"\n        {name}: " in function.__doc__ for name in table), function.__doc__
        assert max(map(len, function.__doc__.splitlines())) <= 120


def test_an_unknown_option_is_a_type_error():
    x, gates = torch.randn(2, 4), torch.randn(3, 4)
    for module in (ops, reference):
        with pytest.raises(TypeError, match="'topk'; expected some of top_k, normalize"):
            module.route(x, gates, topk=2)
    assert filled(APPLY, {"factored": True}) == {"lora_bias": None, "rows": None, "factored": True, "packed": None}
