"""A composition of two models against an independent computation, its caches, its folder and what it refuses."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from builders import make_tokenizer, tiny_t5
from calm_cases import anchor_and_augmenting, batch, composition

import moerge_ext as moerge
from moerge_ext.models.cross_attention import evenly
from moerge_ext.models.pretrained import load_model


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    return anchor_and_augmenting(tmp_path_factory.mktemp("calm"))


def by_hand(cross, anchor, states, mask):
    """H_B + concat_k softmax(Q_k K_k / sqrt(d)) V_k W_O, one sequence, head and position after the other (float64)."""
    wide = {name: getattr(cross, name).weight.double() for name in ("proj", "q_proj", "k_proj", "v_proj", "o_proj")}
    added = torch.zeros(anchor.shape, dtype=torch.float64)
    size = anchor.shape[-1] // cross.heads
    for n in range(len(anchor)):
        source = states[n].double() @ wide["proj"].T
        q, k, v = anchor[n].double() @ wide["q_proj"].T, source @ wide["k_proj"].T, source @ wide["v_proj"].T
        for t in range(anchor.shape[1]):
            seen = [s for s in range(t + 1) if mask[n, s] or s == t]
            for h in range(cross.heads):
                part = slice(h * size, (h + 1) * size)
                weights = (k[seen, part] @ q[t, part] / math.sqrt(size)).softmax(0)
                added[n, t, part] = weights @ v[seen, part]
    return anchor + (added @ wide["o_proj"].T).to(anchor.dtype)


def test_the_forward_is_the_papers(setup):
    """Behind layers 1 and 3 of the anchor, with the augmenting model's states behind its layers 0 and 2."""
    anchor, augmenting, paths = setup
    model, given = composition(paths), batch()
    assert model.config.connections == [[1, 0], [3, 2]]
    with torch.no_grad():
        states = []
        for layer in (0, 2):
            hook = augmenting.model.layers[layer].register_forward_hook(lambda m, args, out: states.append(out))
            augmenting(given["input_ids"], attention_mask=given["attention_mask"])
            hook.remove()
        want = copy.deepcopy(anchor)
        for cross, state, layer in zip(model.cross, states, (1, 3), strict=True):
            want.model.layers[layer].register_forward_hook(
                lambda m, args, out, c=cross, s=state: by_hand(c, out, s, given["attention_mask"])
            )
        expected, got = want(**given), model(**given)
        torch.testing.assert_close(got.logits, expected.logits, atol=2e-5, rtol=1e-5)
        assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert (got.logits - anchor(**given).logits).abs().max() > 1


def test_a_token_sees_nothing_that_comes_and_a_new_composition_is_the_anchor(setup):
    anchor, _, paths = setup
    given = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(composition(paths, trained=False)(given).logits, anchor(given).logits)
        model, other = composition(paths), given.clone()
        other[:, 7:] = other[:, 7:].flip(1)
        a, b = model(given).logits, model(other).logits
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_all_three_caches_is_generation_without(setup, options):
    """Over the augmenting model's sliding window, with padding on the left."""
    model, given = composition(setup[2]), batch()
    del given["labels"]
    options = {"max_new_tokens": 14, "do_sample": False, **options}
    cached = model.generate(**given, **options)
    assert torch.equal(cached, model.generate(**given, use_cache=False, **options)) and cached.shape == (2, 26)
    alone = {name: value[:1, 3:] for name, value in given.items()}
    assert torch.equal(model.generate(**alone, **options)[0], cached[0, 3:])
    assert not torch.equal(cached, setup[0].generate(**given, **options))


def test_saved_and_loaded(setup, tmp_path):
    anchor, _, paths = setup
    model, given = composition(paths), batch()
    model.save_pretrained(tmp_path / "calm")
    again = load_model(str(tmp_path / "calm"), dtype="auto", device="cpu")
    assert type(again) is type(model) and not again.training
    with torch.no_grad():
        assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.trained().keys() == model.trained().keys() and not any(
        p.requires_grad for p in again.anchor.parameters()
    )
    assert (tmp_path / "calm" / "model.safetensors").stat().st_size < 4 * 2 * (48 * 32 + 4 * 32 * 32) + 2000
    half = load_model(str(tmp_path / "calm"), dtype="bfloat16", device="cpu")
    with torch.no_grad():
        got = half(**given).logits
    assert got.dtype == torch.bfloat16 and half.cross[0].proj.weight.dtype == torch.float32
    assert (got.float() - model(**given).logits).abs().max() < 0.5

    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path / "calm", **options)

    other = copy.deepcopy(anchor)
    other.model.norm.weight.data[0] += 1
    other.save_pretrained(tmp_path / "other")
    refused("was trained with another anchor model than what lies in '.*other' today", anchor=str(tmp_path / "other"))
    refused("its augmenting model cannot be read: .*say where it is", augmenting=str(tmp_path / "nowhere"))
    refused("takes no device_map", device_map="auto")
    anchor.save_pretrained(tmp_path / "moved")
    moved = type(model).from_pretrained(tmp_path / "calm", anchor=tmp_path / "moved")
    assert moved.config.anchor == str(tmp_path / "moved")
    config = json.loads((tmp_path / "calm" / "config.json").read_text())
    (tmp_path / "calm" / "config.json").write_text(json.dumps(config | {"connections": [[1, 0]]}))
    refused(r"does not fit its config: cross.1.k_proj.weight: \[32, 32\] \(expected None\)")


def test_refused(setup, tmp_path):
    _, _, paths = setup
    model = composition(paths)

    def refused(message, *models, **options):
        with pytest.raises(ValueError, match=message):
            moerge.compose_models(*(models or paths.values()), **options)

    for heads in (5, 0, -1, True):
        refused(f"heads must divide the anchor's width D=32, got {heads}", connections=2, heads=heads)
    refused(r"connections must be from 1 to 3 \(the models have 4 and 3 layers\), got 4", connections=4)
    for pairs in ([(4, 0)], [(0, 3)], [(1, 0), (1, 1)], [], [(1, 2, 3)]):
        refused(r"must be pairs \(anchor's layer, augmenting's layer\) of layers 0 to 3 and 0 to 2", connections=pairs)
    tiny_t5().save_pretrained(tmp_path / "t5")
    make_tokenizer(tmp_path / "t5")
    refused("is of type 't5': a composition is of two plain decoders", paths["anchor"], tmp_path / "t5")
    tokens = json.loads((paths["anchor"] / "tokenizer.json").read_text())
    tokens["model"]["vocab"]["é"] = len(tokens["model"]["vocab"])
    setup[1].save_pretrained(tmp_path / "french")
    make_tokenizer(tmp_path / "french")
    (tmp_path / "french" / "tokenizer.json").write_text(json.dumps(tokens))
    refused("the tokenizers of anchor and augmenting differ in 1 token", paths["anchor"], tmp_path / "french")
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 12\], got \[2, 5\]"):
        model(batch()["input_ids"], attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="expected the cache that a composition returns, got DynamicCache"):
        model(batch()["input_ids"], past_key_values=transformers.DynamicCache())


def test_layers_lie_evenly():
    assert evenly(4, 32, 16) == [(7, 3), (15, 7), (23, 11), (31, 15)]
    assert evenly(1, 5, 3) == [(4, 2)] and evenly(3, 3, 5) == [(0, 0), (1, 2), (2, 4)]
