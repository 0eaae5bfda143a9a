"""Which experts each token of a prompt was given: against the recorded weights, for every family; text, JSON, HTML."""

from __future__ import annotations

import io
import json
import re

import moe_cases
import patch_cases as cases
import pytest
import torch
from builders import make_tokenizer
from rich.console import Console

import moerge_ext as moerge
from moerge_ext.evaluation.explain import Depth, Stream
from moerge_ext.evaluation.explain_page import write_explanation
from moerge_ext.evaluation.explain_text import as_json, as_text, bands, totals
from moerge_ext.evaluation.token_weights import applied_weights

PROMPT = "ab: cd."


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


def patched(family, tmp_path, method="phatgoose", **options):
    model = cases.build(family)
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model, moerge.patch(model, cases.bank(family, model, tmp_path / "experts"), method, **options)


def dense(calls, count=3):
    weights, experts = (torch.cat(parts) for parts in zip(*calls, strict=True))
    return torch.zeros(len(weights), count).scatter_add(1, experts.long(), weights.float())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_weights_are_those_applied(family, tmp_path, tokenizer):
    model, handle = patched(family, tmp_path)
    found = moerge.explain_tokens(model, tokenizer, PROMPT, max_new_tokens=4)
    assert not any(model.get_submodule(name)._forward_pre_hooks for name in handle.modules)
    (text,) = found.streams
    assert (len(text.ids), text.prompt, len(text.depths)) == (len(PROMPT) + 4, len(PROMPT), 2)
    with handle.record(tokens=True) as trace:
        cases.logits(model, input_ids=torch.tensor([text.ids]))
    for layer in range(2):
        mine = [dense(calls) for path, calls in trace.calls.items() if f".{layer}." in path]
        torch.testing.assert_close(text.weights[:, layer], sum(mine) / len(mine))
    torch.testing.assert_close(text.weights.sum(2), torch.ones(len(text.ids), 2))
    assert text.read.all() and not found.notes
    # greedy generation by itself chooses the same tokens
    own = model.generate(torch.tensor([text.ids[: text.prompt]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert own[0].tolist() == list(text.ids)
    torch.testing.assert_close(totals(found).sum().item(), 1.0)


def test_modules_and_layers(tmp_path, tokenizer):
    model, handle = patched("llama", tmp_path)
    one = moerge.explain_tokens(model, tokenizer, PROMPT, modules=["q_proj"], layers=[1]).streams[0]
    assert [str(depth) for depth in one.depths] == ["1"]
    with handle.record(tokens=True) as trace:
        cases.logits(model, input_ids=torch.tensor([one.ids]))
    torch.testing.assert_close(one.weights[:, 0], dense(trace.calls["model.layers.1.self_attn.q_proj"]))
    both = moerge.explain_tokens(model, tokenizer, PROMPT, modules=["*.mlp.*", "self_attn.q_proj"]).streams[0]
    assert len(both.depths) == 2
    for options, text in (
        ({"modules": ["x_proj"]}, "no routed module is called x_proj; there are .*q_proj"),
        ({"layers": [1, 7]}, "no layer 7; layers with experts: 0 to 1"),
        ({"max_new_tokens": -1}, "must not be negative, got -1"),
        ({"max_new_tokens": 1000}, "more than the context of 128"),
    ):
        with pytest.raises(ValueError, match=text):
            moerge.explain_tokens(model, tokenizer, PROMPT, **options)
    with pytest.raises(ValueError, match="has no token"):
        moerge.explain_tokens(model, tokenizer, "")
    handle.remove()
    with pytest.raises(ValueError, match="not patched"):
        moerge.explain_tokens(model, tokenizer, PROMPT)
    model, _ = patched("llama", tmp_path / "merged", "merged")
    with pytest.raises(ValueError, match="'merged' routes nothing"):
        moerge.explain_tokens(model, tokenizer, PROMPT)


@pytest.mark.parametrize("new", [0, 3, len(PROMPT)])
def test_encoder_and_decoder(new, tmp_path, tokenizer):
    """Cross attention's keys and values see the encoder's tokens, also where both sides are as long."""
    model, handle = patched("t5", tmp_path)
    found = moerge.explain_tokens(model, tokenizer, PROMPT, max_new_tokens=new)
    encoder, decoder = found.streams
    start = len(PROMPT)
    assert (encoder.name, len(encoder.ids), decoder.name, len(decoder.ids)) == ("encoder", start, "decoder", new + 1)
    assert [str(depth) for depth in encoder.depths] == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert [str(depth) for depth in decoder.depths] == ["decoder 0", "decoder 1"] and not found.left_out
    with handle.record(tokens=True) as trace:
        cases.logits(model, input_ids=torch.tensor([encoder.ids]), decoder_input_ids=torch.tensor([decoder.ids]))
    cross = [dense(trace.calls[f"decoder.block.1.layer.1.EncDecAttention.{name}"]) for name in "kv"]
    torch.testing.assert_close(encoder.weights[:, 3], sum(cross) / 2)
    names = [f"layer.0.SelfAttention.{n}" for n in "qkvo"] + [f"layer.1.EncDecAttention.{n}" for n in "qo"]
    names += [f"layer.2.DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo")]
    mine = [dense(trace.calls[f"decoder.block.1.{name}"]) for name in names]
    torch.testing.assert_close(decoder.weights[:, 1], sum(mine) / len(mine))
    assert [name for name, _ in bands(encoder, 1)] == ["encoder layers 0-1", "decoder layers 0-1"]


def test_bands_are_named_by_the_layers_in_them():
    depths = [Depth("", layer) for layer in (0, 1, 2, 7, 9)] + [Depth("lm_head", None)]
    stream = Stream("text", (), (), (), 0, tuple(depths), torch.zeros(0, 6, 1))
    assert bands(stream, 2) == [("layers 0-1", slice(0, 2)), ("layers 2, 7, 9", slice(2, 5)), ("lm_head", slice(5, 6))]
    assert [name for name, _ in bands(stream, 9)] == [*(f"layer {n}" for n in (0, 1, 2, 7, 9)), "lm_head"]


def test_given_weights_are_the_same_everywhere(tmp_path, tokenizer):
    model, handle = patched("llama", tmp_path, "given")
    with handle.affinities(torch.tensor([0.5, -1.5, 0.0])):
        found = moerge.explain_tokens(model, tokenizer, PROMPT, max_new_tokens=2)
    (text,) = found.streams
    torch.testing.assert_close(text.weights, torch.tensor([0.5, -1.5, 0.0]).expand_as(text.weights))
    torch.testing.assert_close(text.shares()[0], torch.tensor([0.25, 0.75, 0.0]))
    assert found.per_sequence and "the same for all tokens" in found.notes[0]
    with pytest.raises(RuntimeError):  # without the block
        moerge.explain_tokens(model, tokenizer, PROMPT)


def test_nothing_is_interpreted(tmp_path, tokenizer):
    """Markup of the terminal and of pages, in the prompt and in the names of experts."""
    model = cases.build("llama")
    names = ("[bold]ant", "<b>bee</b>", "</script><script>alert(1)</script>")
    cases.bank("llama", model, tmp_path / "experts")
    folders = {name: tmp_path / "experts" / old for name, old in zip(names, cases.NAMES, strict=True)}
    bank = moerge.load_experts(folders)
    assert bank.names == names
    letters = {c: i for i, c in enumerate("[red]<script>\x1b\n&")}
    tokenizer._tokenizer.add_tokens(list(dict.fromkeys(letters)))
    prompt = "a[red]b<script>\x1b[31m\n&c"
    with moerge.patch(model, bank):
        found = moerge.explain_tokens(model, tokenizer, prompt)
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=True, color_system="truecolor")
    console.print(as_text(found, parts=2, table=True))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert "\x1b" not in shown and shown.count("\\x1b") >= 2 and "⏎" in shown
    assert "[bold]ant" in shown and "layer 0:" in shown and "layer 1:" in shown
    told = as_json(found)
    assert "".join(piece["text"] for piece in told["streams"][0]["pieces"]) == tokenizer.decode(found.streams[0].ids)
    for token, row in enumerate(told["streams"][0]["tokens"]):
        for layer in range(2):
            weights = [row["weights"][str(layer)].get(name, 0) for name in names]
            torch.testing.assert_close(torch.tensor(weights), found.streams[0].weights[token, layer], atol=1e-6, rtol=0)
    path = tmp_path / "page.html"
    assert write_explanation(found, path, parts=2) == path.stat().st_size
    page = path.read_text()
    assert page.count("<script>") == page.count("</script>") == 1 and "\x1b" not in page and "<b>bee" not in page
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert data["experts"][1] == "<b>bee</b>" and len(data["streams"][0]["pieces"]) == len(found.streams[0].pieces)
    best, weight = data["streams"][0]["pieces"][0][1][0][0]
    assert weight == pytest.approx(found.streams[0].weights[0, 0].max().item(), abs=1e-3)
    assert best == int(found.streams[0].weights[0, 0].argmax())


def test_stacked_experts_of_the_base(tmp_path, tokenizer):
    """gate_up_proj scores tokens; down_proj scores pairs of token and base expert, whose mean a token gets."""
    model = moe_cases.build("qwen3_moe")
    folders = {name: tmp_path / name for name in ("one", "two")}
    for seed, folder in enumerate(folders.values()):
        moe_cases.adapter("qwen3_moe", model, folder, seed, layout="whole")
        moe_cases.gates(model, folder, seed)
    with moerge.patch(model, moerge.load_experts(folders)) as handle:
        found = moerge.explain_tokens(model, tokenizer, PROMPT, layers=[0])
        (text,) = found.streams
        assert not found.left_out and handle.parameters
        torch.testing.assert_close(text.weights.sum(2), torch.ones(len(text.ids), 1))
        with handle.record(tokens=True) as trace:
            cases.logits(model, input_ids=torch.tensor([text.ids]))
        down = moerge.explain_tokens(model, tokenizer, PROMPT, layers=[0], modules=["down_proj"]).streams[0]
    (pairs,) = [dense(calls, 2) for path, calls in trace.calls.items() if path.endswith("0.mlp.experts.down_proj")]
    torch.testing.assert_close(down.weights.sum(0)[0] * 2, pairs.sum(0))  # each token passes two base experts


def test_layers_that_see_a_choice_of_tokens_are_left_out(tmp_path, tokenizer):
    """As a linear layer of one of the base's own experts, which may be given as many tokens as there are."""
    model, handle = patched("llama", tmp_path)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    for name, x, rows in (
        ("model.layers.0.mlp.experts.1.up_proj", torch.randn(5, 32), None),
        ("model.layers.0.mlp.up_proj", torch.randn(5, 32), (5, 5)),
        ("model.layers.0.mlp.up_proj", torch.randn(1, 5, 32), (5, 5)),
        ("model.layers.0.mlp.up_proj", torch.randn(2, 5, 32), None),
    ):
        layer.name = name
        with applied_weights({name: layer}) as applied:
            layer(x)
        assert applied.rows(name) == rows
    with handle.disabled(), pytest.raises(ValueError, match="no routed layer has seen"):
        moerge.explain_tokens(model, tokenizer, PROMPT)
