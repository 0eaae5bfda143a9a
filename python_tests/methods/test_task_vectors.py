"""WE-MoE, PWE-MoE and pi-Tuning against their equations, computed by hand in float64, and what they are trained by."""

from __future__ import annotations

import patch_cases as cases
import pytest
import torch
from gate_builders import Untouched
from router_cases import E, batches, largest_error, trained

import moerge_ext as moerge
from moerge_ext.experts.routers import ROUTERS_FILE
from moerge_ext.training.routers.fisher import fisher_diagonal, nearest_experts
from moerge_ext.training.routers.objective import Entropy, Tasks


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("task_vectors")
    model = cases.build("llama")
    return model, cases.bank("llama", model, root), root


def network(tensors, v):
    t = {name: tensor.double() for name, tensor in tensors.items()}
    return (v @ t["fc1"].T + t["bias1"]).relu() @ t["fc2"].T + t["bias2"]


@pytest.mark.parametrize("mean", [False, True])
def test_we_moe(setup, mean):
    model, experts, root = setup
    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches()]
    routers = trained(model, experts, root / "we", "we_moe", data, lr=0.02, options={"hidden": 5})
    assert routers.tensors.keys() == {"model.layers.0.mlp", "model.layers.1.mlp"}
    seen = {}

    def weights(path, u, h, outputs):
        if ".mlp." not in path:
            return u.new_full((*u.shape[:-1], E), 0.3)
        place = path.rpartition(".")[0]
        if not path.endswith("down_proj"):
            seen[place] = u  # gate_proj and up_proj read what the MLP does
        factors = network(routers.tensors[place], seen[place])
        return factors.mean(-2, keepdim=True).expand(factors.shape) if mean else factors

    wrong, change = largest_error(model, experts, routers, weights, mean=mean)
    assert wrong < 1e-5 and change > 0.01


def test_we_moe_lowers_the_entropy_of_predictions_without_labels(setup, tmp_path):
    model, experts, _ = setup
    data = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches(2)]
    data[0]["attention_mask"][0, :3] = 0
    result = moerge.train_routers(
        model, experts, data, tmp_path, method="we_moe", steps=10, lr=0.02, progress=False, validation=data
    )
    assert result.validation[10] < result.validation[0] - 0.02
    with moerge.patch(model, experts, "we_moe", routers=result.path) as handle, torch.no_grad():
        p = model(**data[0]).logits.softmax(-1)
        want = -(p * p.log()).sum(-1)[data[0]["attention_mask"] == 1].mean()
        labelled = data[0] | {"labels": torch.zeros_like(data[0]["input_ids"])}
        assert Entropy(handle)(model, labelled).item() == pytest.approx(want.item(), rel=1e-5)
        for kept in (3, torch.tensor([1, 4])):  # the model gives the logits of these positions alone
            columns = slice(-kept, None) if isinstance(kept, int) else kept
            want = -(p * p.log()).sum(-1)[:, columns][data[0]["attention_mask"][:, columns] == 1].mean()
            assert Entropy(handle)(model, data[0] | {"logits_to_keep": kept}).item() == pytest.approx(
                want.item(), rel=1e-5
            )


def test_pwe_moe(setup):
    model, experts, root = setup
    own = {name: [cases.batch("llama", seed=i, labels=True)] for i, name in enumerate(experts.names)}
    result = moerge.train_routers(
        model, experts, None, root / "pwe", method="pwe_moe", expert_data=own, steps=8, lr=0.05, progress=False
    )
    routers = moerge.read_routers(result.path)
    for preference, p in ((None, [1 / 3] * 3), ("0.7,0.2,0.1", [0.7, 0.2, 0.1]), ([0, 0, 5], [0.0, 0.0, 1.0])):
        p = torch.tensor(p, dtype=torch.float64)

        def weights(path, u, h, outputs, p=p):
            if ".mlp." not in path:
                return u.new_full((*u.shape[:-1], E), 0.3)
            return network(routers.tensors[path.rpartition(".")[0]], p).expand(*u.shape[:-1], E)

        wrong, change = largest_error(model, experts, routers, weights, preference=preference)
        assert wrong < 1e-5 and change > 0.01
    for bad in ("1,2", [1, -1, 1], [0, 0, 0], "a,b,c", 3):
        with pytest.raises(ValueError, match="preference must be 3 numbers"):
            moerge.patch(model, experts, "pwe_moe", routers=routers, preference=bad)


def test_the_loss_of_pwe_moe_is_the_tasks_losses_by_the_preference(setup):
    model, experts, root = setup
    own = {name: [cases.batch("llama", seed=i, labels=True)] for i, name in enumerate(experts.names)}
    with moerge.patch(model, experts, "pwe_moe", routers=root / "pwe") as handle, torch.no_grad():
        batch = {"tasks": [own[name][0] for name in experts.names]}
        torch.manual_seed(3)
        model.train()
        got = Tasks(handle)(model, batch)
        model.eval()
        torch.manual_seed(3)
        p = torch.empty(E).exponential_()
        p = p / p.sum()
    with moerge.patch(model, experts, "pwe_moe", routers=root / "pwe", preference=p.tolist()), torch.no_grad():
        losses = [model(**own[name][0]).loss for name in experts.names]
    assert got.item() == pytest.approx(
        sum(w * loss.item() for w, loss in zip(p.tolist(), losses, strict=True)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "pwe_moe"}, r"pass expert_data=\{name: rows\} .*, and no data"),
        ({"method": "pwe_moe", "expert_data": {"ant": batches()}, "data": None}, "there is none of bee, cat"),
        ({"method": "mole", "expert_data": {"ant": batches()}}, "takes no data of single experts"),
        ({"method": "mole", "data": None}, "pass data"),
        ({"method": "we_moe", "balance": 0.1}, "balance is for weights that are a softmax"),
        ({"method": "we_moe", "options": {"mlp": "("}}, "mlp must be a regular expression"),
        ({"method": "we_moe", "options": {"mlp": "nothing"}}, "nothing to train"),
        ({"method": "pi_tuning", "options": {"nearest": 0}}, "nearest must be a positive integer"),
        ({"method": "pi_tuning", "expert_data": dict.fromkeys(cases.NAMES, batches())}, "target must name the expert"),
    ],
)
def test_bad_arguments(setup, options, said, tmp_path):
    model, experts, _ = setup
    untouched = Untouched(model)
    options = {"data": batches()} | options
    with pytest.raises(ValueError, match=said):
        moerge.train_routers(model, experts, options.pop("data"), tmp_path, progress=False, **options)
    untouched.check()
    assert not (tmp_path / ROUTERS_FILE).exists()


# ---- pi-Tuning -------------------------------------------------------------------------------------------------------


def test_pi_tuning(setup, tmp_path):
    model, experts, _ = setup
    own = {name: [cases.batch("llama", rows=1, seed=i, labels=True)] for i, name in enumerate(experts.names)}
    own["cat"] = own["ant"]
    untouched, before = Untouched(model), {p: b.lora_A.clone() for p, b in experts.modules.items()}
    result = moerge.train_routers(
        model, experts, batches(), tmp_path, method="pi_tuning", options={"target": "cat", "nearest": 1},
        expert_data=own, steps=8, lr=0.02, progress=False,
    )  # fmt: skip
    untouched.check()
    assert all(
        torch.equal(experts.modules[p].lora_A, a) and not experts.modules[p].lora_A.requires_grad
        for p, a in before.items()
    )
    routers = moerge.read_routers(result.path)
    fishers = {name: fisher_diagonal(model, experts, name, own[name], progress=False) for name in experts.names}
    far = min(("ant", "bee"), key=lambda name: float(fishers[name] @ fishers["cat"]))
    assert routers.options == {"without": far}
    out = experts.names.index(far)
    inputs = cases.batch("llama", rows=3, length=6, seed=9)

    def factored(path, u):
        t = routers.tensors[f"experts/{path}"]
        logits = routers.tensors[path]["logits"].double().clone()
        logits[out] = -torch.inf
        w = logits.softmax(-1)
        a, b = (torch.einsum("e,eij->ij", w, t[name].double()) for name in ("lora_A", "lora_B"))
        return u.double() @ a.T @ b.T

    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda layer, args, y, path=path: y + factored(path, args[0]).to(y.dtype)
        )
        for path in experts.modules
    ]
    want = cases.logits(model, **inputs)
    [hook.remove() for hook in hooks]
    with moerge.patch(model, experts, "pi_tuning", routers=routers):
        assert cases.error(cases.logits(model, **inputs), want) < 1e-5


def test_fisher_is_the_mean_square_of_the_gradients(setup):
    """Against autograd on the plain model with the expert's product added."""
    model, experts, _ = setup
    examples = [cases.batch("llama", rows=1, seed=seed, labels=True) for seed in range(2)]
    untouched = Untouched(model)
    got = fisher_diagonal(model, experts, "bee", examples, progress=False)
    untouched.check()
    factors = {
        path: [t[1].clone().requires_grad_(True) for t in (bank.lora_A, bank.lora_B)]
        for path, bank in experts.modules.items()
    }
    sums = {path: [torch.zeros_like(t) for t in pair] for path, pair in factors.items()}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda layer, args, y, path=path: y + args[0] @ factors[path][0].T @ factors[path][1].T
        )
        for path in factors
    ]
    for example in examples:
        grads = torch.autograd.grad(model(**example).loss, [t for pair in factors.values() for t in pair])
        for total, grad in zip((s for pair in sums.values() for s in pair), grads, strict=True):
            total += grad.square()
    [hook.remove() for hook in hooks]
    want = torch.cat([part for a, b in sums.values() for part in (a.mean(0), b.mean(1))]).double()
    torch.testing.assert_close(got, want / want.norm(), rtol=1e-3, atol=1e-6)
    assert got.norm() == pytest.approx(1)


def test_the_nearest_experts_are_those_of_the_largest_cosine():
    fishers = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([0.6, 0.8]), "c": torch.tensor([0.8, 0.6])}
    assert nearest_experts(fishers, "a", 1) == ["a", "c"]
    assert nearest_experts(fishers, "c", 5) == ["a", "b", "c"]
