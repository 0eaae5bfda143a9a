"""`train_mix`: what is trained of a mixture of whole models, its balance, resumption and refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from builders import tiny_llama
from mixture_cases import batches, mixture

import moerge_ext as moerge
from moerge_ext.training.mixture import CHECKPOINT_FOLDER, Balanced


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def model(source):
    return copy.deepcopy(source)


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("train", "lr"), [("router", 0.1), ("all", 0.003)])
def test_what_is_trained_changes_and_nothing_else(source, model, train, lr, tmp_path):
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    result = moerge.train_mix(
        model, batches(), tmp_path, train=train, steps=10, lr=lr, validation=batches(), progress=False
    )
    assert result.validation[10] < result.validation[0] - 0.02 and result.path == tmp_path
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags and not model.training
    before, trained = source.state_dict(), loaded(tmp_path)
    for name, p in trained.named_parameters():
        assert torch.equal(p, before[name]) != (train == "all" or name.endswith("mlp.gate.weight")), name
        assert torch.equal(p, model.get_parameter(name)), name
    with torch.no_grad():
        loss = sum(trained(**batch).loss.item() for batch in batches()) / 3
    assert loss == pytest.approx(result.validation[10], rel=1e-4)
    files = {"config.json", "generation_config.json", "model.safetensors", "moerge_mix.json"}
    assert {file.name for file in tmp_path.iterdir()} == files
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    said = json.loads((tmp_path / "moerge_mix.json").read_text())
    assert said["experts"] == ["a", "b", "c"] and said["train"] == train


def test_the_balance_loss_is_switchs(model):
    """N sum_e f_e p_e of every layer, padding left out: token by token, by the model's own choices."""
    batch = batches(1)[0]
    loss = Balanced(model, 0.7)
    with torch.no_grad():
        model.eval()
        plain = loss(model, batch)
        seen = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(lambda gate, args, out: seen.append(out))
        model.train()
        got = loss(model, batch)
    assert plain == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    real, want = batch["attention_mask"].flatten().tolist(), 0.0
    for logits, _, chosen in seen[:2]:
        share, mean, tokens = [0.0] * 3, [0.0] * 3, sum(real)
        for t in (t for t, is_real in enumerate(real) if is_real):
            for e in chosen[t].tolist():
                share[e] += 1 / (2 * tokens)
            for e, p in enumerate(logits[t].double().softmax(-1).tolist()):
                mean[e] += p / tokens
        want += 3 * sum(f * p for f, p in zip(share, mean, strict=True))
    assert got.item() - plain.item() == pytest.approx(0.7 * want, rel=1e-5)


def test_balance_evens_the_experts(source, tmp_path):
    """With a router that begins at one expert, the balance alone is what spreads the tokens."""
    made = {}
    for balance in (0.0, 1.0):
        model = copy.deepcopy(source)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight[0] += 0.3 * layer.post_attention_layernorm.weight
        folder = tmp_path / str(balance)
        moerge.train_mix(model, batches(), folder, balance=balance, steps=20, lr=0.02, progress=False)
        with torch.no_grad():
            made[balance] = Balanced(model, 1.0)(model.train(), batches(1)[0]) - model.eval()(**batches(1)[0]).loss
    assert made[1.0] < made[0.0] - 0.02


def test_a_killed_run_goes_on_to_the_same_numbers(source, tmp_path):
    options = {"steps": 6, "lr": 0.05, "progress": False, "train": "all"}

    def run(folder, data, **more):
        return moerge.train_mix(copy.deepcopy(source), data, tmp_path / folder, **options, **more)

    def killed():
        yield from batches()
        raise KeyboardInterrupt

    whole = run("whole", batches())
    with pytest.raises(KeyboardInterrupt):
        run("cut", killed())
    assert [file.name for file in (tmp_path / "cut").iterdir()] == [CHECKPOINT_FOLDER]
    with pytest.raises(ValueError, match="balance: saved with 0.01, now 0.5"):
        run("cut", batches(), resume=True, balance=0.5)
    resumed = run("cut", batches(), resume=True)
    assert resumed.losses == whole.losses and not resumed.already
    a, b = loaded(tmp_path / "whole").state_dict(), loaded(tmp_path / "cut").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a) and not (tmp_path / "cut" / CHECKPOINT_FOLDER).exists()
    assert run("cut", batches(), resume=True).already
    with pytest.raises(ValueError, match="config.json is there already: name another folder"):
        run("cut", batches())


def test_what_is_written_has_the_type_that_is_asked_for(model, tmp_path):
    model.config.tie_word_embeddings = True
    model.tie_weights()
    moerge.train_mix(model, batches(), tmp_path, steps=2, dtype=torch.bfloat16, progress=False)
    made = loaded(tmp_path)
    assert made.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert made.lm_head.weight is made.model.embed_tokens.weight
    for name, p in made.named_parameters():
        assert torch.equal(p, model.get_parameter(name).bfloat16()), name


def test_refused(model, tmp_path):
    def refused(message, model, **options):
        with pytest.raises(ValueError, match=message):
            moerge.train_mix(model, batches(), tmp_path / "out", progress=False, **options)
        assert not (tmp_path / "out").exists()

    refused("train must be one of router, all, got 'experts'", model, train="experts")
    refused("balance must not be negative, got -1", model, balance=-1)
    refused("LlamaForCausalLM is no mixture of experts", tiny_llama())
    refused("gate.weight is torch.bfloat16, in which small steps are lost", copy.deepcopy(model).bfloat16())
    model.config.num_experts_per_tok = 1
    refused("num_experts_per_tok=1: the one expert of a token has weight 1", model)
