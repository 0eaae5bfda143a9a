"""Experts on packed tokens against the same experts on a patched model."""

from __future__ import annotations

import builders
import pytest
import torch
from serving_cases import NAMES, QKV, Packed, folders, layers, patched, served, tables_of, tokens

from moerge_ext.serving.requests import Choice
from moerge_ext.serving.settings import Settings

METHODS = (
    "phatgoose",
    "arrow",
    "arrow_mttl",
    "arrow_peft",
    "arrow_phatgoose",
    "average_activation",
    "average_activation_mttl",
    "merged",
    "merged_factors",
    "expert:bee",
)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fixed", (False, True), ids=("free", "for graphs"))
def test_packed_modules_equal_the_patched_ones(experts, method, fixed):
    pool = served(experts, method=method)
    model, handle = patched(experts, method)
    x = tokens(7, 32)
    want = layers(model, QKV, x)
    with handle.disabled():
        base = layers(model, QKV, x)
    tables = tables_of(pool, fixed=fixed)
    packed = Packed(builders.tiny_llama(), pool, tables)
    tables.begin([None, None], [3, 4])
    got = packed(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - base).abs().max() > 0.05, "the experts do nothing here"


@pytest.mark.parametrize("fixed", (False, True), ids=("free", "for graphs"))
def test_every_request_of_a_step_has_its_own_routing(experts, fixed):
    """Default, base alone, weights, one expert, another method, packed in one step with padding behind."""
    pool = served(experts, method="phatgoose", methods={"arrow": {}, "glider_code": {}, "merged": {}})
    weights, affinities = (0.5, 0.0, -1.5, 0.0), (0.9, 0.0, 0.1, 0.0)
    choices = [
        None,
        Choice(None),
        Choice(None, weights=weights),
        Choice("arrow"),
        Choice("glider_code", affinities=affinities),
        Choice("merged"),
        None,
    ]
    lengths = [3, 2, 4, 1, 5, 2, 1]
    x = tokens(sum(lengths) + 6, 32)
    tables = tables_of(pool, fixed=fixed)
    packed = Packed(builders.tiny_llama(), pool, tables)
    tables.begin(choices, lengths)
    got = packed(x)
    parts = list(x.split([*lengths, 6]))
    for i, (method, rows) in enumerate(
        [
            ("phatgoose", None),
            (None, None),
            ("given", torch.tensor(weights)),
            ("arrow", None),
            ("glider_code", torch.tensor(affinities)),
            ("merged", None),
            ("phatgoose", None),
            (None, None),  # of padding
        ]
    ):
        mine = got.split([*lengths, 6])[i]
        torch.testing.assert_close(mine, alone(experts, method, rows, parts[i]), rtol=1e-5, atol=1e-5)
    tables.begin([None, None], [4, 4])  # nothing of the last step stays
    torch.testing.assert_close(packed(x[:8]), alone(experts, "phatgoose", None, x[:8]), rtol=1e-5, atol=1e-5)


def alone(experts, method, rows, x):
    """What one request gets by itself from a patched model."""
    model, handle = patched(experts, method or "phatgoose")
    if method is None:
        with handle.disabled():
            return layers(model, QKV, x)
    if rows is None:
        return layers(model, QKV, x)
    with handle.affinities(rows):
        return layers(model, QKV, x)


def test_a_mask_of_absent_experts_meets_a_request(tmp_path):
    """k_proj of one expert only: others never win there, whatever the row allows."""
    made = builders.random_experts(builders.tiny_llama(), tmp_path, NAMES[:2], ("q_proj", "k_proj", "v_proj"))
    more = builders.random_experts(builders.tiny_llama(), tmp_path, NAMES[2:], ("q_proj", "v_proj"), seed=1)
    paths = [str(path) for path in (made | more).values()]
    pool = served(paths, method="phatgoose")
    tables = tables_of(pool)
    packed = Packed(builders.tiny_llama(), pool, tables)
    x = tokens(9, 32)
    for choices in ([None, None, Choice(None)], [Choice(None, weights=(0.0, 0.0, 1.0, 0.0)), None, None]):
        tables.begin(choices, [4, 3, 2])
        got = packed(x).split([4, 3, 2])
        for choice, mine, part in zip(choices, got, x.split([4, 3, 2]), strict=True):
            if choice is None:
                want = alone(paths, "phatgoose", None, part)
            elif choice.weights is None:
                want = alone(paths, None, None, part)
            else:
                want = alone(paths, "given", torch.tensor(choice.weights), part)
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


def test_one_bank_for_all_methods(experts):
    """A rank holds the factors once, the very tensors that were loaded."""
    pool = served(experts, method="phatgoose", methods=["arrow", "average_activation"])
    branch = Packed(builders.tiny_llama(), pool, tables_of(pool)).branches[0]
    made = pool.methods[0].plans[QKV[0]]
    bank = branch.bank
    assert bank.lora_A.data_ptr() == made.lora_A.data_ptr() and bank.lora_B.data_ptr() == made.lora_B.data_ptr()
    assert {m.plans[QKV[0]].lora_A.data_ptr() for m in pool.methods} == {bank.lora_A.data_ptr()}


def test_more_ranks_than_heads_of_k_and_v(experts):
    """Four ranks, two heads of k and v: each rank has one head of q, and two ranks share one of k and v."""
    pool, x = served(experts), tokens(9, 32)
    model = patched(experts, "phatgoose")[0]
    for rank in range(4):
        tables = tables_of(pool)
        tables.begin([None], [9])
        got = Packed(builders.tiny_llama(), pool, tables, rank, 4)(x).split(8, -1)
        for part, module, head in zip(got, QKV, (rank, rank // 2, rank // 2), strict=True):
            torch.testing.assert_close(part, layers(model, (module,), x)[:, head * 8 : head * 8 + 8])


def test_a_method_with_factors_of_its_own_beside_others(experts):
    """Each routes among its own, whichever is the default; requests weigh the experts as they came."""
    x, affinities, weights = tokens(6, 32), (0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 0.5, 1.0)
    pool = served(experts, methods=["twin_merging"])
    tables, model = tables_of(pool), builders.tiny_llama()
    packed = Packed(model, pool, tables)
    for choice, method, scores in (
        (Choice("twin_merging", affinities=affinities), "twin_merging", affinities),
        (Choice(None, weights=weights), "given", weights),
    ):
        tables.begin([choice], [6])
        want, handle = patched(experts, method)
        with handle.affinities(torch.tensor(scores)):
            torch.testing.assert_close(packed(x), layers(want, QKV, x))
    tables.begin([None], [6])
    torch.testing.assert_close(packed(x), layers(patched(experts, "phatgoose")[0], QKV, x))


def test_experts_on_the_head_are_refused_before_weights_are_read(tmp_path):
    made = builders.random_experts(builders.tiny_llama(), tmp_path, ("a",), ("lm_head", "q_proj"))
    with pytest.raises(ValueError, match="lm_head: an engine computes the head in a way of its own"):
        served([str(made["a"])])
    assert len(served([str(made["a"])], modules="q_proj").modules) == 2


def test_fewer_tokens_than_a_step_has_are_of_nobody(experts):
    pool = served(experts)
    tables = tables_of(pool)
    packed = Packed(builders.tiny_llama(), pool, tables)
    tables.begin([Choice(None, weights=(1.0, 0.0, 0.0, 0.0)), None], [4, 4])
    with pytest.raises(RuntimeError, match="was given 2 tokens of a step of 8"):
        packed(tokens(2, 32))
    tables.end()  # an engine's run without requests may be shorter
    packed(tokens(2, 32))


def test_tables_keep_their_addresses(experts):
    """So that a captured graph reads what the next step has written."""
    pool = served(experts, method="glider_code", methods=["phatgoose"])
    tables = tables_of(pool, fixed=True)
    Packed(builders.tiny_llama(), pool, tables)

    def addresses():
        held = [tables.weights, tables.experts, *tables.bias.values(), *tables._allowed.values(), tables.rows(9)]
        return [tensor.data_ptr() for tensor in held]

    before = addresses()
    tables.begin([Choice("glider_code", affinities=(1.0, 0.0, 0.0, 0.0)), Choice(None)], [3, 6])
    tables.begin([Choice("phatgoose")], [9])
    assert addresses() == before and not tables.plain


def test_the_front_end_knows_the_experts_that_a_worker_loads(experts):
    """By their headers, in the same order, whatever is chosen of them."""
    for said in ({"experts": experts}, {"experts": {"x": experts[1], "y": experts[0]}, "names": ["y", "x"]}):
        settings = Settings.parse(said)
        assert tuple(settings.expert_folders(None)) == settings.load(None).names
