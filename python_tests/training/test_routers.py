"""The trainer of routers: what is learned, kept, resumed, refused and left alone."""

from __future__ import annotations

import copy
import json

import patch_cases as cases
import pytest
import torch
from builders import random_experts, write_adapter
from gate_builders import Untouched
from router_cases import E, batches, trained

import moerge_ext as moerge
from moerge_ext.experts.routers import ROUTERS_FILE
from moerge_ext.training.routers.objective import Objective
from moerge_ext.training.routers.train import CHECKPOINT_FOLDER


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("routers")
    model = cases.build("llama")
    folders = list(random_experts(model, root, cases.NAMES, cases.DECODER).values())
    return model, folders, moerge.load_experts(folders)


@pytest.mark.parametrize("method", ["lora_flow", "mole", "meteora"])
def test_training_lowers_the_loss_and_touches_nothing_else(setup, method, tmp_path):
    model, _, experts = setup
    untouched = Untouched(model)
    before = {path: (bank.lora_A.clone(), bank.lora_B.clone()) for path, bank in experts.modules.items()}
    result = moerge.train_routers(
        model, experts, batches(), tmp_path, method=method, steps=12, lr=0.03, balance=0, validation=batches(),
        progress=False,
    )  # fmt: skip
    untouched.check()
    assert result.validation[12] < result.validation[0] - 0.05 and result.best_step == 12
    assert all(torch.equal(b.lora_A, before[p][0]) and torch.equal(b.lora_B, before[p][1]) for p, b in
               experts.modules.items())  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == [ROUTERS_FILE]
    with moerge.patch(model, experts, method, routers=tmp_path), torch.no_grad():
        loss = sum(model(**batch).loss.item() for batch in batches()) / 3
    assert loss == pytest.approx(result.validation[12], rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_numbers(setup, tmp_path):
    model, _, experts = setup
    options = {"method": "mole", "steps": 6, "lr": 0.05, "progress": False, "dropout": 0.4}
    whole = moerge.train_routers(model, experts, batches(), tmp_path / "whole", **options)

    def killed():
        yield from batches()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moerge.train_routers(model, experts, killed(), tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / ROUTERS_FILE).exists() and (tmp_path / "cut" / CHECKPOINT_FOLDER).is_dir()
    resumed = moerge.train_routers(model, experts, batches(), tmp_path / "cut", resume=True, **options)
    assert resumed.losses == whole.losses
    a, b = (moerge.read_routers(r.path).tensors for r in (whole, resumed))
    assert all(torch.equal(a[path][name], b[path][name]) for path in a for name in a[path])
    assert moerge.train_routers(model, experts, batches(), tmp_path / "cut", resume=True, **options).already
    with pytest.raises(ValueError, match="balance: saved with"):
        (tmp_path / "cut" / ROUTERS_FILE).unlink()
        with pytest.raises(KeyboardInterrupt):
            moerge.train_routers(model, experts, killed(), tmp_path / "cut", **options)
        moerge.train_routers(model, experts, batches(), tmp_path / "cut", resume=True, balance=2.0, **options)


def test_the_balance_loss_is_the_papers(setup, tmp_path):
    """- sum_e log q_e, q_e the mean weight over tokens and routers; padding does not count."""
    model, _, experts = setup
    routers = trained(model, experts, tmp_path, "mole", steps=3, balance=0.0)
    batch = cases.batch("llama", labels=True)
    batch["attention_mask"][0, -3:] = 0
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    with moerge.patch(model, experts, "mole", routers=routers) as handle, torch.no_grad():
        model.train()
        plain = Objective(handle)(model, batch)
        balanced = Objective(handle, balance=0.25)(model, batch)
        model.eval()
        assert Objective(handle, balance=0.25)(model, batch) == plain
        with handle.record() as trace:
            model(**batch)
    real = int(batch["attention_mask"].sum())
    q = torch.stack(list(trace.load().values())).sum(0) / (real * len(experts.modules))
    assert balanced.item() == pytest.approx(plain.item() - 0.25 * q.log().sum().item(), rel=1e-5)


def test_the_z_loss_is_the_mean_square_of_logsumexp(setup, tmp_path):
    model, _, experts = setup
    routers = trained(model, experts, tmp_path, "meteora", steps=3)
    batch, scores = cases.batch("llama", labels=True), []
    with moerge.patch(model, experts, "meteora", routers=routers) as handle, torch.no_grad():
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda layer, args, gates=routers.tensors[path]["gates"]: scores.append(
                    (args[0] @ gates.T).flatten(0, 1)
                )
            )
            for path in handle.modules
        ]
        model.train()
        with_z = Objective(handle, z=0.5)(model, batch)
        want = torch.stack([s.logsumexp(-1).square().mean() for s in scores]).mean()
        [hook.remove() for hook in hooks]
        plain = Objective(handle)(model, batch)
        model.eval()
    assert with_z.item() == pytest.approx(plain.item() + 0.5 * want.item(), rel=1e-5)


def test_dropped_experts_have_no_weight_and_come_back(setup, tmp_path):
    model, _, experts = setup
    for method in ("lora_flow", "mole", "meteora"):
        routers = trained(model, experts, tmp_path, method, steps=1)
        with moerge.patch(model, experts, method, routers=routers) as handle:
            loss = Objective(handle, dropout=0.9)
            torch.manual_seed(0)
            seen = set()
            for _ in range(12):
                model.train()
                with torch.no_grad(), handle.record() as trace:
                    loss(model, batches(1)[0])
                used = [tuple((w > 0).tolist()) for w in trace.load().values()]
                assert len(set(used)) == 1 and any(used[0]), "everywhere the same experts sit out, and not all"
                seen.add(used[0])
            assert len(seen) > 2 and min(map(sum, seen)) == 1
            model.eval()
            with torch.no_grad(), handle.record() as trace:
                loss(model, batches(1)[0])
            assert method == "meteora" or (trace.share() > 0).all()


def test_who_was_left_out_of_the_training_has_no_part_later(setup, tmp_path):
    model, _, experts = setup
    first, second, *_ = experts.names
    options = {"method": "mole", "options": {"without": first}, "steps": 2, "progress": False}
    routers = moerge.read_routers(moerge.train_routers(model, experts, batches(), tmp_path, **options).path)
    for said, out in ((None, {first}), (second, {first, second}), ([first], {first})):
        with moerge.patch(model, experts, "mole", routers=routers, without=said) as handle, handle.record() as trace:
            model(**cases.batch("llama"))
            assert set(handle.options["without"].split(",")) == out
        load = sum(trace.load().values())
        assert {name for name, weight in zip(experts.names, load.tolist(), strict=True) if weight == 0} == out


def test_experts_can_be_trained_with_the_routers(setup, tmp_path):
    model, folders, experts = setup
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    routers = trained(model, experts, tmp_path, "meteora", train_experts=True)
    path = "model.layers.0.mlp.up_proj"
    factors = routers.tensors[f"experts/{path}"]
    assert not torch.equal(factors["lora_A"], experts.modules[path].lora_A)
    with moerge.patch(model, experts, "meteora", routers=routers):
        torch.testing.assert_close(model.get_submodule(path).lora_A, factors["lora_A"])
    assert files == [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
@pytest.mark.parametrize(("method", "losses"), [("mole", {"balance": 0.5}), ("meteora", {"z": 0.5, "balance": 0.1})])
def test_balance_and_z_do_not_depend_on_gradient_checkpointing(setup, method, losses, tmp_path):
    model, _, experts = setup
    options = {"method": method, "steps": 3, "lr": 0.05, "progress": False, **losses}
    plain = moerge.train_routers(model, experts, batches(), tmp_path / "a", **options)
    model = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = moerge.train_routers(model, experts, batches(), tmp_path / "b", **options)
    assert again.losses == pytest.approx(plain.losses, rel=1e-5)
    with pytest.warns(UserWarning, match=r"checkpointing is enabled and does nothing.*call model.train\(\)"):
        moerge.train_routers(model.eval(), experts, batches(), tmp_path / "c", **options)


def test_what_a_model_writes_into_is_refused(setup, tmp_path):
    """Losses of what a layer gives are taken after the forward, when the model may have changed it."""
    model, _, experts = setup
    model = copy.deepcopy(model)
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU(inplace=True)
    with pytest.raises(RuntimeError, match="layers.0.mlp.gate_proj: the model writes into what this layer"):
        moerge.train_routers(
            model, experts, batches(), tmp_path, method="meteora", steps=1, z=0.1, sparsity=0.1, progress=False
        )


@pytest.mark.filterwarnings("ignore:.*use_cache.*")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_router_of_a_layer_refuses_gradient_checkpointing(setup, reentrant, tmp_path):
    """What is computed again is the layer's forward alone, without the router that read its input."""
    model, _, experts = setup
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        with pytest.raises(RuntimeError, match="did not run around it"):
            moerge.train_routers(model, experts, batches(), tmp_path, method="lora_flow", steps=1, progress=False)
    finally:
        model.gradient_checkpointing_disable()


def test_a_header_that_says_nonsense_is_refused(setup, tmp_path):
    model, _, experts = setup
    routers = trained(model, experts, tmp_path, "mole", steps=1)
    routers.options["reads"] = "everything"
    with pytest.raises(ValueError, match="reads must be 'outputs' or 'input'"):
        moerge.patch(model, experts, "mole", routers=routers)
    del routers.options["reads"]
    with pytest.raises(ValueError, match="do not say reads; train them again"):
        moerge.patch(model, experts, "mole", routers=routers)


# ---- wrong use -------------------------------------------------------------------------------------------------------


def test_routers_of_other_experts_are_named(setup, tmp_path):
    model, folders, experts = setup
    routers = trained(model, experts, tmp_path / "r", "meteora", steps=1)

    def said(bank, method="meteora", **options) -> str:
        with pytest.raises(ValueError) as caught:
            moerge.patch(model, bank, method, routers=routers, **options)
        return str(caught.value)

    assert "trained for method 'meteora'" in said(experts, "mole")
    turned = moerge.load_experts(folders[::-1])
    assert "in that order, as names=['ant', 'bee', 'cat'] (--names ant bee cat) does" in said(turned)
    more = list(random_experts(model, tmp_path / "more", ["dog"], cases.DECODER, seed=6).values())
    assert "names=['ant', 'bee', 'cat'] (--names ant bee cat) loads those" in said(moerge.load_experts(folders + more))
    fewer = said(moerge.load_experts(folders[:2]))
    assert "ant, bee, cat" in fewer and "got ant, bee" in fewer
    renamed = said(moerge.load_experts({"ant": folders[0], "dog": folders[1], "cat": folders[2]}))
    assert "'dog' is their 'bee'" in renamed
    other = list(random_experts(model, tmp_path / "other", ["bee"], cases.DECODER, seed=5).values())
    changed = said(moerge.load_experts([folders[0], other[0], folders[2]]))
    assert "expert 'bee' is not the one" in changed and "'ant'" not in changed and "'cat'" not in changed
    some = moerge.load_experts(folders, modules="q_proj")
    assert "have modules that these lack" in said(some)
    for dtype in (torch.bfloat16, torch.float16):
        moerge.patch(model, moerge.load_experts(folders, dtype=dtype), "meteora", routers=routers).remove()
    assert not hasattr(model, "_moerge_handle")


def test_routers_of_another_shape_or_place_are_named(setup, tmp_path):
    model, _, experts = setup
    routers = trained(model, experts, tmp_path, "mole", steps=1)
    path = "model.layers.1.mlp.down_proj"
    other = copy.deepcopy(routers)
    other.tensors[path]["gate"] = other.tensors[path]["gate"][:, 1:]
    with pytest.raises(ValueError, match=f"'{path}': expected a router of gate"):
        moerge.patch(model, experts, "mole", routers=other)
    del other.tensors[path]
    with pytest.raises(ValueError, match=f"'{path}': the file has no router"):
        moerge.patch(model, experts, "mole", routers=other)
    with pytest.raises(ValueError, match="trained with reads='outputs' \\(asked for 'input'\\)"):
        moerge.patch(model, experts, "mole", routers=routers, reads="input")


def test_what_is_no_file_of_routers_is_said(setup, tmp_path):
    model, folders, experts = setup
    with pytest.raises(ValueError, match="does not exist: `moerge train-routers`"):
        moerge.patch(model, experts, "mole", routers=tmp_path)
    with pytest.raises(ValueError, match="no file of routers: expected moerge-routers 1"):
        moerge.read_routers(folders[0] / "adapter_model.safetensors")
    (tmp_path / ROUTERS_FILE).write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        moerge.read_routers(tmp_path)
    with pytest.raises(ValueError, match="needs routers that were trained"):
        moerge.patch(model, experts, "mole")
    with pytest.raises(ValueError, match="routers must be a file"):
        moerge.patch(model, experts, "mole", routers=3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "arrow"}, "no router to train; those that have: .*lora_flow, mole"),
        ({"method": "mole", "dropout": 1.0}, "dropout must be in"),
        ({"method": "mole", "balance": -1.0}, "balance must not be negative"),
        ({"method": "mole", "options": {"reads": "x"}}, "reads must be 'outputs' or 'input'"),
        ({"method": "mole", "options": {"routers": "x"}}, "leave routers out"),
        ({"method": "lora_flow", "z": 0.1}, "one router for several"),
        ({"method": "meteora", "options": {"top_k": 1}}, "top_k=1"),
    ],
)
def test_bad_arguments(setup, options, said, tmp_path):
    model, _, experts = setup
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=said):
        moerge.train_routers(model, experts, batches(), tmp_path / "r", progress=False, **options)
    untouched.check()
    assert not (tmp_path / "r" / ROUTERS_FILE).exists()


def test_an_expert_without_a_module_has_no_weight_there(tmp_path):
    model = cases.build("llama")
    folders = list(random_experts(model, tmp_path, cases.NAMES, cases.DECODER).values())
    q = "model.layers.0.self_attn.q_proj"
    generator = torch.Generator().manual_seed(4)
    part = {q: (torch.randn(4, 32, generator=generator), torch.randn(32, 4, generator=generator))}
    part = write_adapter(tmp_path / "part", part)
    experts = moerge.load_experts([*folders, part])
    for method in ("mole", "meteora", "lora_flow"):
        routers = trained(model, experts, tmp_path / method, method)
        with moerge.patch(model, experts, method, routers=routers) as handle, handle.record() as trace:
            cases.logits(model, **cases.batch("llama"))
        up = trace.load()["model.layers.0.mlp.up_proj"]
        assert (up[E] == 0) == (method != "lora_flow") and up[:E].sum() > 0


def test_the_file_says_of_what_it_is(setup, tmp_path):
    from safetensors import safe_open

    model, _, experts = setup
    trained(model, experts, tmp_path, "mole", steps=2, options={"per": "layer"})
    with safe_open(tmp_path / ROUTERS_FILE, framework="pt") as file:
        facts = json.loads(file.metadata()["routers"])
        assert set(file.keys()) > {"model.layers.0/gate", "marks/model.layers.0.mlp.up_proj"}
    assert facts == {
        "method": "mole", "names": list(cases.NAMES), "width": 32,
        "options": {"reads": "outputs", "per": "layer", "without": None},
    }  # fmt: skip
