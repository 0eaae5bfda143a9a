"""PEMT against its equations, computed by hand in float64, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import builders
import patch_cases as cases
import pytest
import torch
from query_cases import WORDS, described, fake_embedder, wide_tokenizer
from router_cases import by_hand, largest_error, products
from torch.nn import functional

import moerge_ext as moerge
from moerge_ext.experts.routers import ROUTERS_FILE
from moerge_ext.training.encoding import Encoder, collator
from moerge_ext.training.routers.objective import Objective, cosines

SAID = "please do digging, then count"
OPTIONS = {"description": SAID, "task_rank": 3}
ROWS = [{"input": f"say {c}:", "target": c * 3} for c in "abcdefgh"]
TRAINING = {"overwrite": True, "method": "pemt", "progress": False, "batch_size": 4, "lr": 0.05, "steps": 6}


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("pemt")
    model, tokenizer = cases.build("llama"), wide_tokenizer(root / "tokenizer")
    experts = described(builders.random_experts(model, root / "experts", cases.NAMES, cases.DECODER))
    result = moerge.train_routers(model, experts, ROWS, root, tokenizer=tokenizer, options=OPTIONS, **TRAINING)
    return model, tokenizer, experts, root, result


def correlation(tensors):
    """c [D] in float64, row by row."""
    target, rows = tensors["target"].double(), []
    for p in target:
        row = p.clone()
        for source, real in zip(tensors["sources"].double(), tensors["real"], strict=True):
            source = source[: int(real.sum())]
            row += functional.softmax(source @ p, 0) @ source
        rows.append(row)
    mean = sum(rows) / len(rows)
    return mean / (mean**2).mean().sqrt()


def weights_of(routers):
    c = correlation(routers.tensors["common"])

    def weights(path, u, h, outputs):
        return (routers.tensors[path]["gate"].double() @ c).softmax(-1).expand(*u.shape[:-1], -1)

    return weights


def test_features_and_ready_batches_are_no_rows(setup, tmp_path):
    """The tokenizer is then there for the descriptions alone."""
    model, tokenizer, experts, _, result = setup
    features, collate = Encoder(model, tokenizer).features(ROWS), collator(tokenizer)
    kinds = {"features": {"data": features, "collate_fn": collate}, "batches": {"data": [collate(features)]}}
    losses = {}
    for name, data in kinds.items():
        options = {**TRAINING, "output_dir": tmp_path / name, "tokenizer": tokenizer, "options": OPTIONS, **data}
        losses[name] = moerge.train_routers(model, experts, **options).losses
    assert losses["features"] == result.losses, "what their rows give"
    assert losses["batches"][-1] < losses["batches"][0]


def test_the_patched_model_is_the_equation(setup):
    model, _, experts, root, _ = setup
    routers, inputs = moerge.read_routers(root), {}

    def weights(path, u, h, outputs):
        inputs[path] = u
        return weights_of(routers)(path, u, h, outputs)

    def with_task(path, summed):
        t = {name: tensor.double() for name, tensor in routers.tensors[path].items()}
        return summed + inputs[path] @ t["task_A"].T @ t["task_B"].T

    for options in ({}, {"backend": "reference"}):
        wrong, change = largest_error(model, experts, routers, weights, finish=with_task, **options)
        assert wrong < 1e-5 and change > 0.01
    shares = torch.stack([weights_of(routers)(p, torch.zeros(1, 1), None, None)[0] for p in experts.modules])
    assert (shares - 1 / 3).abs().max() > 0.05, "the gates have learned"
    changed = {path: routers.tensors[path]["task_B"].abs().max() for path in experts.modules}
    assert min(changed.values()) > 0.01


def test_prompts_are_the_bases_embeddings_of_what_is_said(setup, tmp_path):
    model, tokenizer, experts, root, _ = setup
    kept = moerge.read_routers(root).tensors["common"]
    embed = model.get_input_embeddings().weight.detach()
    for e, name in enumerate(experts.names):
        want = embed[tokenizer(f"please do {WORDS[name]}").input_ids]
        assert int(kept["real"][e].sum()) == len(want) and torch.equal(kept["sources"][e, : len(want)], want)
        assert not kept["sources"][e, len(want) :].any()
    begun = embed[tokenizer(SAID).input_ids]
    assert kept["target"].shape == begun.shape and not torch.equal(kept["target"], begun), "it is trained"
    options = TRAINING | {"steps": 1, "lr": 1e-9}
    moerge.train_routers(model, experts, ROWS, tmp_path, tokenizer=tokenizer, options=OPTIONS, **options)
    routers = moerge.read_routers(tmp_path)
    torch.testing.assert_close(routers.tensors["common"]["target"], begun)
    assert all(routers.tensors[path]["gate"].abs().max() < 1e-6 for path in experts.modules)


def test_the_sparsity_loss_is_the_codes(setup):
    """Mean over modules of sum_e w_e (1 - cos(y, z_e)); padding does not count."""
    model, _, experts, root, _ = setup
    routers, outputs = moerge.read_routers(root), {}
    batch = cases.batch("llama", labels=True)
    batch["attention_mask"][0, -3:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    real = batch["attention_mask"].bool()
    with moerge.patch(model, experts, "pemt", routers=routers) as handle, torch.no_grad():
        model.train()
        plain = Objective(handle)(model, batch)
        sparse = Objective(handle, sparsity=0.25)(model, batch)
        model.eval()
        assert Objective(handle, sparsity=0.25)(model, batch) == plain
        hooks = [
            model.get_submodule(path).register_forward_hook(
                lambda layer, args, y, path=path: outputs.update({path: (args[0][real].double(), y[real].double())})
            )
            for path in handle.modules
        ]
        model(**batch)
        [hook.remove() for hook in hooks]
    found = []
    for path, (u, y) in outputs.items():
        w = weights_of(routers)(path, u, None, None)[0]
        z = torch.einsum("eod,td->eto", products(experts, path), u)
        cos = torch.stack([functional.cosine_similarity(y.flatten(), one.flatten(), dim=0) for one in z])
        found.append((w * (1 - cos)).sum())
    assert len(found) == 14
    assert sparse.item() == pytest.approx(plain.item() + 0.25 * torch.stack(found).mean().item(), rel=1e-5)


def test_sparsity_has_finite_gradients_for_experts_that_add_nothing(setup, tmp_path):
    """An expert without a LoRA in some modules."""
    model, tokenizer, experts, _, _ = setup
    folders = builders.random_experts(model, tmp_path, ("ant", "bee"), cases.DECODER)
    other = builders.random_experts(model, tmp_path / "o", ("cat",), ("q_proj",))
    bank = described(folders | other)
    result = moerge.train_routers(
        model, bank, ROWS, tmp_path, tokenizer=tokenizer, options=OPTIONS, **TRAINING | {"sparsity": 5.0}
    )
    routers = moerge.read_routers(result.path)
    assert all(tensor.isfinite().all() for named in routers.tensors.values() for tensor in named.values())
    path = "model.layers.1.mlp.up_proj"
    with moerge.patch(model, bank, "pemt", routers=routers) as handle, handle.record() as trace:
        cases.logits(model, **cases.batch("llama"))
    load = trace.load()
    assert load[path][2] == 0 and (load[path][:2] > 0).all() and (load["model.layers.1.self_attn.q_proj"] > 0).all()


def test_cosines_with_output_biases():
    random = torch.Generator().manual_seed(0)
    a, b, bias, x, y = (
        torch.randn(shape, generator=random) for shape in ((3, 2, 5), (3, 4, 2), (3, 4), (7, 5), (7, 4))
    )
    a[2], bias[2] = 0, 0
    layer = SimpleNamespace(lora_A=a, lora_B=b, lora_bias=bias)
    z = torch.einsum("eor,erd,td->eto", b.double(), a.double(), x.double()) + bias.double()[:, None]
    want = [functional.cosine_similarity(y.double().flatten(), one.flatten(), dim=0) for one in z]
    torch.testing.assert_close(cosines(y, x, layer), torch.stack(want).float())


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
def test_gradient_checkpointing_gives_the_same_numbers(setup, tmp_path):
    model, tokenizer, experts, _, whole = setup
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    result = moerge.train_routers(model, experts, ROWS, tmp_path, tokenizer=tokenizer, options=OPTIONS, **TRAINING)
    assert result.losses == pytest.approx(whole.losses, rel=1e-5)


def test_it_generates_is_copied_and_leaves_the_model(setup):
    model, _, experts, root, _ = setup
    inputs, before = cases.batch("llama", rows=2, length=5), cases.snapshot(model)
    with moerge.patch(model, experts, "pemt", routers=root):
        want = cases.logits(model, **inputs)
        steps = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(steps, model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(cases.logits(other, **inputs), want)
            prompts = {id(layer.weigher.common) for layer in other.modules() if hasattr(layer, "weigher")}
            assert len(prompts) == 1, "the copy's layers share theirs, too"
        half = copy.deepcopy(model).bfloat16()
        assert half.model.layers[0].self_attn.q_proj.weigher.common.target.dtype == torch.float32
        assert cases.error(cases.logits(half, **inputs).float(), want) < 0.3
    assert cases.same(before, cases.snapshot(model))


def test_an_encoder_decoder(tmp_path):
    """Its weights depend on nothing that cross-attention would read."""
    model, tokenizer = cases.build("t5"), wide_tokenizer(tmp_path / "tokenizer")
    targets = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
    experts = described(builders.random_experts(model, tmp_path, cases.NAMES, targets))
    moerge.train_routers(model, experts, ROWS, tmp_path, tokenizer=tokenizer, options=OPTIONS, **TRAINING)
    with moerge.patch(model, experts, "pemt", routers=tmp_path), torch.no_grad():
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3)


def test_a_killed_run_goes_on_to_the_same_numbers(setup, tmp_path):
    model, tokenizer, experts, root, whole = setup
    options = {**TRAINING, "options": OPTIONS, "tokenizer": tokenizer, "checkpoint_every": 1}
    real, calls = Objective.of_batch, []

    def killed(self, model, batch):
        calls.append(0)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, model, batch)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Objective, "of_batch", killed)
        moerge.train_routers(model, experts, ROWS, tmp_path, **options)
    assert not (tmp_path / ROUTERS_FILE).exists()
    other = copy.copy(experts)
    other.global_metadata = copy.deepcopy(experts.global_metadata)
    other.global_metadata["instruction-embedding"]["bee"]["instruction"] = "something else"
    with pytest.raises(ValueError, match="experts: saved with"):
        moerge.train_routers(model, other, ROWS, tmp_path, resume=True, **options)
    result = moerge.train_routers(model, experts, ROWS, tmp_path, resume=True, **options)
    assert result.losses == whole.losses
    got, want = (moerge.read_routers(folder).tensors for folder in (tmp_path, root))
    assert all(torch.equal(got[path][name], want[path][name]) for path in want for name in want[path])


# ---- wrong use -------------------------------------------------------------------------------------------------------


def test_what_training_needs_is_named(setup, tmp_path):
    model, tokenizer, experts, _, _ = setup

    def said(bank=experts, options=OPTIONS, **training) -> str:
        with pytest.raises(ValueError) as caught:
            training = {"tokenizer": tokenizer} | training
            moerge.train_routers(model, bank, ROWS, tmp_path / "r", options=options, **TRAINING | training)
        assert not hasattr(model, "_moerge_handle") and not (tmp_path / "r").exists()
        return str(caught.value)

    assert "needs description, a sentence of what the task asks for" in said(options={})
    assert "description must say what the task asks for, got ' '" in said(options={"description": " "})
    assert "task_rank must be a positive integer" in said(options=OPTIONS | {"task_rank": 0})
    folders = builders.random_experts(model, tmp_path, cases.NAMES, cases.DECODER)
    moerge.describe(folders["bee"], [], fake_embedder(), instruction="please fly")
    assert "no instruction for ant, cat: write it with `moerge describe" in said(moerge.load_experts(folders))
    assert "sparsity must not be negative, got -1" in said(sparsity=-1.0)
    batches = [cases.batch("llama", labels=True)]
    with pytest.raises(ValueError, match="reads descriptions: pass tokenizer="):
        moerge.train_routers(model, experts, batches, tmp_path / "r", options=OPTIONS, **TRAINING)
    with pytest.raises(ValueError, match="sparsity is for weights that are a softmax"):
        moerge.train_routers(model, experts, batches, tmp_path, method="mixda", sparsity=0.1, progress=False)


def test_a_file_that_does_not_fit_is_named(setup, tmp_path):
    model, _, experts, root, _ = setup
    routers = moerge.read_routers(root)

    def said(routers=routers, bank=experts, **options) -> str:
        with pytest.raises(ValueError) as caught:
            moerge.patch(model, bank, "pemt", routers=routers, **options)
        return str(caught.value)

    assert "trained with description=" in said(description="another task")
    folders = builders.random_experts(model, tmp_path, ("ant", "bee"), cases.DECODER)
    assert "got ant, bee" in said(bank=moerge.load_experts(folders))
    other = copy.deepcopy(routers)
    other.tensors["common"]["target"] = other.tensors["common"]["target"][:, 1:]
    assert "expected prompts of 3 experts for a base of width 32" in said(other)
    other.tensors["common"] |= {"target": torch.tensor(1.0), "real": torch.tensor(1.0)}
    assert "target []" in said(other)
    del other.tensors["common"]
    assert "the file's are none: train them again" in said(other)
    other = copy.deepcopy(routers)
    other.tensors["common"]["real"] = other.tensors["common"]["real"][:2]
    assert "real [2, " in said(other)
    other = copy.deepcopy(routers)
    other.tensors["common"]["real"][1] = 0
    assert "the prompt of an expert has no token" in said(other)
    assert "needs routers that were trained" in said(None)


def test_the_gate_alone_is_what_is_by_hand(setup):
    """Without the task's LoRA the model is another: the test above does not pass by chance."""
    model, _, experts, root, _ = setup
    inputs = cases.batch("llama", rows=3, length=6, seed=9)
    with by_hand(model, experts, weights_of(moerge.read_routers(root))):
        without = cases.logits(model, **inputs)
    with moerge.patch(model, experts, "pemt", routers=root):
        assert cases.error(cases.logits(model, **inputs), without) > 1e-3
