"""What `record()` counts: the tokens that the attention mask lets in."""

from __future__ import annotations

import inspect
import threading

import moe_cases
import patch_cases as cases
import pytest
import torch
from patch_cases import logits

import moerge_ext as moerge

LENGTHS = (7, 3)


def padded(left: bool) -> dict[str, torch.Tensor]:
    ids, mask = cases.tokens(2), torch.ones(2, 7, dtype=torch.long)
    mask[1, : 7 - LENGTHS[1]] = 0
    mask = mask if left else mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(row: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    real = inputs["attention_mask"][row].bool()
    return {key: value[row : row + 1, real] for key, value in inputs.items()}


def close(got, want):
    assert got.counts().keys() == want.counts().keys()
    for module, counts in want.counts().items():
        assert torch.equal(got.counts()[module], counts), module
        torch.testing.assert_close(got.load()[module], want.load()[module], atol=1e-3, rtol=1e-3)


@pytest.fixture(params=["llama", "gpt2", "bert", "t5"])
def patched(request, tmp_path):
    model = cases.build(request.param)
    with moerge.patch(model, cases.bank(request.param, model, tmp_path)) as handle:
        yield request.param, model, handle


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(patched, left):
    family, model, handle = patched
    inputs, ends = padded(left), {}
    if family == "t5":
        decoder = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        ends = {"decoder_input_ids": cases.tokens(2, 4, seed=1), "decoder_attention_mask": decoder}
    if family in ("gpt2", "bert") and left:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with handle.record(tokens=True) as trace:
        logits(model, **inputs, **ends)
    with handle.record() as singles:
        for row in (0, 1):
            own = {key: value[row : row + 1, ends["decoder_attention_mask"][row].bool()] for key, value in ends.items()}
            logits(model, **alone(row, inputs), **own)
    for module, counts in singles.counts().items():
        assert torch.equal(trace.counts()[module], counts), module
        tokens = 2 if "pooler" in module or module == "classifier" else 10
        if family == "t5" and "decoder" in module:
            tokens = 10 if ".EncDecAttention.k" in module or ".EncDecAttention.v" in module else 6
        assert counts.sum() == 2 * tokens and trace.calls[module][0][0].shape == (tokens, 2), module


def test_labels_say_what_the_decoder_computes(tmp_path):
    model = cases.build("t5")
    with moerge.patch(model, cases.bank("t5", model, tmp_path)) as handle, handle.record() as trace:
        labels = torch.tensor([[5, 6, 7, 2], [5, 2, -100, -100]])
        logits(model, **padded(left=False), labels=labels)
    assert trace.counts()["decoder.block.0.layer.0.SelfAttention.q"].sum() == 2 * 6
    assert trace.counts()["encoder.block.0.layer.0.SelfAttention.q"].sum() == 2 * 10


def test_a_mask_by_position(patched):
    family, model, handle = patched
    inputs, names = padded(left=False), list(inspect.signature(model.forward).parameters)
    last = {"decoder_input_ids": cases.tokens(2, 4)} if family == "t5" else {}
    with handle.record() as trace, torch.no_grad():
        model(*map(inputs.get, names[: names.index("attention_mask") + 1]), **last)
    module = next(iter(trace.counts()))
    assert trace.counts()[module].sum() == 2 * 10


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}]
)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate(family, cache, tmp_path):
    model = cases.build(family)
    inputs, options = padded(left=family == "llama"), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with moerge.patch(model, cases.bank(family, model, tmp_path)) as handle:
        with handle.record() as trace:
            model.generate(**inputs, **options, **cache)
        with handle.record() as singles:
            for row in (0, 1):
                model.generate(**alone(row, inputs), **options, **cache)
    close(trace, singles)


def test_other_inputs_count_whole(tmp_path):
    """A layer whose input has not the mask's sizes, and a model that has no mask."""
    model = cases.build("llama")
    with moerge.patch(model, cases.bank("llama", model, tmp_path)) as handle:
        layer = model.model.layers[0].mlp.up_proj
        with handle.record() as trace:
            logits(model, **padded(left=True))
            layer(torch.randn(3, 32))
            logits(model, input_ids=cases.tokens(2))
    assert trace.counts()["model.layers.0.mlp.up_proj"].sum() == 2 * (10 + 3 + 14)


def test_every_request_has_its_own_mask(tmp_path):
    model = cases.build("llama")
    handle, together = moerge.patch(model, cases.bank("llama", model, tmp_path)), threading.Barrier(2)
    traces = {}

    def ask(left, **inputs):
        with handle.record() as traces[left]:
            for _ in range(4):
                together.wait(30)
                logits(model, **inputs)

    threads = [threading.Thread(target=ask, args=(left,), kwargs=padded(left)) for left in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(counts.sum() == 4 * 2 * 10 for trace in traces.values() for counts in trace.counts().values())


def test_rows_are_kept_apart(patched):
    """Each sequence's shares are those that it has alone, whatever stands beside it."""
    family, model, handle = patched
    inputs, ends = padded(left=family in ("llama", "gpt2")), {}
    if family == "t5":
        ends = {"decoder_input_ids": cases.tokens(2, 4, seed=1)}
    if family in ("gpt2", "bert"):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with handle.record(rows=2) as trace:
        logits(model, **inputs, **ends)
    for row in (0, 1):
        with handle.record() as single:
            logits(model, **alone(row, inputs), **{key: value[row : row + 1] for key, value in ends.items()})
        torch.testing.assert_close(trace.row_share()[row], single.share(), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(trace.row_share()[0], trace.row_share()[1], atol=1e-3)
    with pytest.raises(ValueError, match="at least 1; got 0"), handle.record(rows=0):
        pass


def test_rows_of_a_mixture_and_of_layers_that_do_not_tell(tmp_path):
    """Fused experts sort their tokens by expert; a call whose rows are not known counts in the whole trace alone."""
    model = moe_cases.build("qwen3_moe")
    for seed, name in enumerate(("ant", "bee")):
        moe_cases.adapter("qwen3_moe", model, tmp_path / name, seed, layout="whole")
        moe_cases.gates(model, tmp_path / name, seed)
    bank = moerge.load_experts([tmp_path / "ant", tmp_path / "bee"])
    with moerge.patch(model, bank, top_k=1) as handle:
        ids = cases.tokens(2)
        with handle.record(rows=2) as trace:
            logits(model, input_ids=ids)
        for row in (0, 1):
            with handle.record() as single:
                logits(model, input_ids=ids[row : row + 1])
            torch.testing.assert_close(trace.row_share()[row], single.share(), atol=1e-3, rtol=1e-3)
    model = cases.build("llama")
    with moerge.patch(model, cases.bank("llama", model, tmp_path / "llama")) as handle, handle.record(rows=2) as trace:
        model.model.layers[0].mlp.up_proj(torch.randn(3, 32))
    assert trace.row_share().sum() == 0 and trace.counts()["model.layers.0.mlp.up_proj"].sum() == 6
