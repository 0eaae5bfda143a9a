"""The options of the ops: one list for wrappers, reference, gradients and the schemas of csrc/ops.cpp."""

from __future__ import annotations

import inspect

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
    "routed_linear": BRANCH,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_schema_has_the_same_options_in_the_same_order(name):
    arguments = getattr(torch.ops.moerge, name).default._schema.arguments
    options = {a.name: a.default_value for a in arguments if a.has_default_value()}
    assert list(options.items()) == list(TABLES[name].items())
    assert {a.name for a in arguments if a.name in options and "Tensor" in str(a.type)} == TENSORS & options.keys()


@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("name", TABLES)
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
