"""Co-LLM on a tiny model: its loss, its decoding and its likelihoods, token by token and by hand."""

from __future__ import annotations

import copy

import builders
import patch_cases as cases
import pytest
import torch
from query_cases import wide_tokenizer
from router_cases import by_hand

import moerge_ext as moerge
from moerge_ext.experts.routers import ROUTERS_FILE
from moerge_ext.training.routers.deferral import INIT_FILE, best_threshold
from moerge_ext.training.routers.run import STATE_FILE
from moerge_ext.training.routers.train import CHECKPOINT_FOLDER

ROWS = [{"input": f"say {c}:", "target": c * 3} for c in "abcdefgh"]
TRAINING = {"overwrite": True, "method": "co_llm", "progress": False, "batch_size": 4, "lr": 0.05, "steps": 8}
INIT = {"init_steps": 6}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("co_llm")
    model = cases.build("llama")
    tokenizer = wide_tokenizer(root / "tokenizer")
    experts = cases.bank("llama", model, root / "experts")
    result = moerge.train_routers(
        model, experts, ROWS, root, tokenizer=tokenizer, validation=ROWS[:3], options=INIT, **TRAINING
    )
    return model, tokenizer, experts, root, result


def one_by_one(model, experts, e, ids):
    """(last hidden states [T,D], logits [T,V]) of the base (e = 0) or of expert e alone, in float64, by hand."""
    weights = torch.zeros(len(experts.names)).double()
    if e:
        weights[e - 1] = 1.0
    with by_hand(model, experts, lambda path, u, h, outputs: weights.expand(*u.shape[:-1], -1)), torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
        return hidden, hidden @ model.lm_head.weight.double().T


def chances(theta, h):
    """P(z | h): e^0, e^(theta_e h), over their sum."""
    odds = torch.cat([torch.ones(1).double(), torch.exp(theta.double() @ h)])
    return odds / odds.sum()


def likelihood(setup, theta, prompt, answer):
    """log P(x_t | x_<t) of every token of an answer."""
    model, tokenizer, experts, _, _ = setup
    asked = moerge.CoLLM(model, tokenizer, experts, setup[3])
    start, end = asked.prompt_ids(prompt), asked.target_ids(answer)
    said = [one_by_one(model, experts, e, start + end) for e in range(1 + len(experts.names))]
    found = []
    for t, token in enumerate(end, len(start) - 1):
        gate = chances(theta, said[0][0][t])
        found.append(torch.log(sum(gate[e] * said[e][1][t].softmax(-1)[token] for e in range(len(said)))))
    return torch.stack(found)


def test_the_loss_that_training_reports_is_the_marginal_likelihood(setup):
    _, _, experts, root, result = setup
    routers = moerge.read_routers(root)
    theta = routers.tensors["gate"]["theta"]
    assert theta.shape == (3, 32) and routers.names == experts.names and routers.width == 32
    assert result.validation[8] < result.validation[0]
    tokens = torch.cat([likelihood(setup, theta, row["input"], row["target"]) for row in ROWS[:3]])
    assert -tokens.mean().item() == pytest.approx(result.validation[result.best_step], rel=1e-5)


def test_weak_labels_train_the_gate_first(setup, tmp_path):
    """Without its first stage, training begins at the mean output embedding; with it, elsewhere and nearer."""
    model, tokenizer, experts, _, result = setup
    without = moerge.train_routers(
        model, experts, ROWS, tmp_path, tokenizer=tokenizer, validation=ROWS[:3], options={"init_steps": 0}, **TRAINING
    )
    mean = model.lm_head.weight.detach().mean(0).expand(3, -1)
    tokens = torch.cat([likelihood(setup, mean, row["input"], row["target"]) for row in ROWS[:3]])
    assert -tokens.mean().item() == pytest.approx(without.validation[0], rel=1e-5)
    assert result.validation[0] != pytest.approx(without.validation[0], rel=1e-3)


def test_answers_are_decoded_token_by_token(setup):
    """Without cache, batch or padding: the gate chooses who writes, and what he finds likeliest is written."""
    model, tokenizer, experts, root, _ = setup
    theta = moerge.read_routers(root).tensors["gate"]["theta"]
    asked = moerge.CoLLM(model, tokenizer, experts, root, threshold=0.6)
    prompts, limit, want, spoke = ["say a:", "please say h:", "b"], 9, [], []
    for prompt in prompts:
        ids, written, counts = asked.prompt_ids(prompt), [], [0] * 4
        while len(written) < limit and (not written or written[-1] not in asked.ends):
            said = [one_by_one(model, experts, e, ids + written) for e in range(4)]
            gate = chances(theta, said[0][0][-1])
            who = 1 + int(gate[1:].argmax()) if 1 - gate[0] > 0.6 else 0
            written.append(int(said[who][1][-1].argmax()))
            counts[who] += 1
        want.append(tokenizer.decode(written, skip_special_tokens=True).strip())
        spoke.append(counts)
    before = cases.snapshot(model)
    assert asked.generate(prompts, limit) == want
    assert asked.written.tolist() == spoke and asked.names == ("base", *cases.NAMES)
    assert sum(any(column) for column in zip(*spoke, strict=True)) > 1, "several have written"
    with asked.ready():
        assert asked.generate(prompts, limit) == want
    assert cases.same(before, cases.snapshot(model))


def test_a_threshold_of_one_is_the_base_and_of_zero_never(setup):
    model, tokenizer, experts, root, _ = setup
    alone = moerge.CoLLM(model, tokenizer, experts, root, threshold=1)
    base = super(moerge.CoLLM, alone).texts(["say a:", "b"], 6)
    assert alone.texts(["say a:", "b"], 6) == base and not alone.written[:, 1:].any()
    never = moerge.CoLLM(model, tokenizer, experts, root, threshold=0)
    never.texts(["say a:", "b"], 6)
    assert not never.written[:, 0].any() and never.written.any()


def test_likelihoods_are_of_the_mixture(setup):
    model, tokenizer, experts, root, _ = setup
    theta = moerge.read_routers(root).tensors["gate"]["theta"]
    asked = moerge.CoLLM(model, tokenizer, experts, root)
    prompts, answers = ["say a:", "please"], ["aaa", "no!"]
    want = [likelihood(setup, theta, *pair) for pair in zip(prompts, answers, strict=True)]
    for length_norm in (False, True):
        got = asked.log_likelihoods(prompts, answers, length_norm=length_norm)
        sums = torch.stack([w.mean() if length_norm else w.sum() for w in want])
        torch.testing.assert_close(got, sums, atol=1e-5, rtol=1e-5)


def test_an_encoder_decoder(tmp_path):
    """The gate reads the decoder's last hidden state; the mixture by the model's own logits."""
    model = cases.build("t5")
    tokenizer, experts = wide_tokenizer(tmp_path / "tokenizer"), cases.bank("t5", model, tmp_path / "experts")
    moerge.train_routers(model, experts, ROWS, tmp_path, tokenizer=tokenizer, options=INIT, **TRAINING)
    asked = moerge.CoLLM(model, tokenizer, experts, tmp_path, threshold=0.5)
    prompt, answer, theta = "say a:", "aaa", moerge.read_routers(tmp_path).tensors["gate"]["theta"]
    labels = torch.tensor([asked.target_ids(answer)])
    inputs = {"input_ids": torch.tensor([asked.prompt_ids(prompt)]), "labels": labels}
    seen, probabilities = [], []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with moerge.patch(model, experts, "given") as handle, torch.no_grad():
        for weights in torch.cat([torch.zeros(1, 3), torch.eye(3)]):
            with handle.affinities(weights):
                logits = model(**inputs).logits[0].double()
            probabilities.append(logits.softmax(-1).gather(-1, labels[0][:, None])[:, 0])
    hook.remove()
    gates = torch.stack([chances(theta, h) for h in seen[0]], 1)
    want = torch.log((gates * torch.stack(probabilities)).sum(0)).sum()
    got = asked.log_likelihoods([prompt], [answer], length_norm=False)
    torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)
    assert len(asked.generate(["say a:", "b"], 4)) == 2 and asked.written.sum() > 0


@pytest.mark.parametrize("steps", [2, 9])
def test_a_killed_run_goes_on_to_the_same_numbers(setup, steps, tmp_path):
    """Killed among the weak labels and after them."""
    model, tokenizer, experts, root, whole = setup
    options = {**TRAINING, "options": INIT, "tokenizer": tokenizer, "validation": ROWS[:3], "checkpoint_every": 1}
    from moerge_ext.training import loop

    class Killed(Exception):
        pass

    done, run = 0, loop._Run._gradients

    def until(self, stream):
        nonlocal done
        done += 1
        if done > steps:
            raise Killed
        return run(self, stream)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(loop._Run, "_gradients", until)
        moerge.train_routers(model, experts, ROWS, tmp_path, **options)
    left = {file.name for file in (tmp_path / CHECKPOINT_FOLDER).iterdir()}
    assert left == ({INIT_FILE} if steps < 6 else {INIT_FILE, STATE_FILE}) and not (tmp_path / ROUTERS_FILE).exists()
    result = moerge.train_routers(model, experts, ROWS, tmp_path, resume=True, **options)
    assert result.losses == whole.losses and [file.name for file in tmp_path.iterdir()] == [ROUTERS_FILE]
    got, want = (moerge.read_routers(folder).tensors["gate"] for folder in (tmp_path, root))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert moerge.train_routers(model, experts, ROWS, tmp_path, resume=True, **options).already


def test_the_threshold_is_the_one_under_which_most_tokens_are_right(setup):
    deferred = torch.tensor([0.9, 0.8, 0.3, 0.1])
    odds = torch.stack([1 - deferred, 0.7 * deferred, 0.3 * deferred], 1).log()
    right = torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 1], [1, 1, 0]]).bool()
    assert 0.3 <= best_threshold(odds, right) < 0.8
    assert best_threshold(odds, torch.tensor([[1, 1, 1]] * 4).bool()) == pytest.approx(0.9), "of equals, defer least"
    assert best_threshold(odds, torch.tensor([[0, 1, 0]] * 4).bool()) < 0.1
    assert 0 <= moerge.CoLLM(*setup[:4]).threshold <= 1


# ---- wrong use -------------------------------------------------------------------------------------------------------


def test_a_gate_of_other_experts_or_another_base_is_named(setup, tmp_path):
    model, tokenizer, experts, root, _ = setup
    routers = moerge.read_routers(root)

    def said(bank=experts, routers=routers, base=model, **options) -> str:
        with pytest.raises(ValueError) as caught:
            moerge.CoLLM(base, tokenizer, bank, routers, **options)
        return str(caught.value)

    folders = builders.random_experts(model, tmp_path, cases.NAMES, cases.DECODER)
    assert "got ant, bee" in said(moerge.load_experts({n: folders[n] for n in ("ant", "bee")}))
    renamed = {"ant": folders["ant"], "dog": folders["bee"], "cat": folders["cat"]}
    assert "'dog' is their 'bee'" in said(moerge.load_experts(renamed))
    other = builders.random_experts(model, tmp_path / "other", ["bee"], cases.DECODER, seed=5)
    assert "expert 'bee' is not the one" in said(moerge.load_experts(folders | other))
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(model.config.vocab_size + 8)
    assert "trained with a base of 96 tokens, this one has 104" in said(base=wide)
    narrow = copy.deepcopy(routers)
    narrow.tensors["gate"]["theta"] = narrow.tensors["gate"]["theta"][:, 1:]
    assert "expected a gate of theta [3, 32]" in said(routers=narrow) and "theta [3, 31]" in said(routers=narrow)
    damaged = copy.deepcopy(routers)
    damaged.tensors["gate"]["threshold"] = torch.tensor([7.0])
    assert "its threshold must be in [0, 1], got 7" in said(routers=damaged)
    narrow.tensors = {}
    assert "the file's is none" in said(routers=narrow)
    assert "needs a gate that was trained" in said(routers=None)
    assert "trained with init_steps=6 (asked for 7)" in said(init_steps=7)
    flow = moerge.train_routers(
        model, experts, ROWS, tmp_path / "flow", method="lora_flow", tokenizer=tokenizer, steps=1, progress=False
    )
    assert "trained for method 'lora_flow'" in said(routers=flow.path)
    with pytest.raises(ValueError, match="no output embeddings"):
        moerge.CoLLM(cases.build("bert"), tokenizer, experts, routers)
    with pytest.raises(ValueError, match="decodes greedily"):
        moerge.CoLLM(model, tokenizer, experts, routers).texts(["a"], 2, do_sample=True)
    assert not hasattr(model, "_moerge_handle")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balance": 0.1}, "one gate, without balance"),
        ({"dropout": 0.1, "z": 1.0}, "without z and dropout"),
        ({"train_experts": True}, "leave train_experts out"),
        ({"expert_data": {"ant": ROWS}}, "takes no data of single experts"),
        ({"options": {"init_steps": 1.5}}, "init_steps must be an integer"),
        ({"options": {"top_k": 2}}, "unknown option"),
    ],
)
def test_training_refuses_by_name(setup, options, said, tmp_path):
    model, tokenizer, experts, _, _ = setup
    with pytest.raises(ValueError, match=said):
        moerge.train_routers(model, experts, ROWS, tmp_path, tokenizer=tokenizer, **TRAINING | options)
    assert not (tmp_path / ROUTERS_FILE).exists() and not hasattr(model, "_moerge_handle")
