"""A patched model has its own names: the state dict and `named_parameters()` say what they say without the patch, and
libraries that look tensors up by name find them."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import patch_cases as cases
import pytest
import torch
from patch_cases import batch, logits, snapshot
from torch import nn

import moerge_ext as moerge
from moerge_ext.training.gated_lora import gated_model

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def llama():
    return cases.build("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    model = cases.build("llama")
    return cases.builders.random_experts(model, tmp_path_factory.mktemp("llama"), cases.NAMES, cases.DECODER)


@pytest.fixture
def experts(folders):
    return moerge.load_experts(folders)


def names(model):
    """What `remove_duplicate` and tied weights leave of the names, in their order."""
    return (
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_one_name_in_both(family, tmp_path):
    model = cases.build(family)
    experts = cases.bank(family, model, tmp_path)
    before, plain = names(model), logits(model, **batch(family))
    buffers = dict(model.named_buffers())
    with moerge.patch(model, experts):
        assert names(model) == before
        assert buffers.keys() <= dict(model.named_buffers()).keys()
        want = logits(model, **batch(family))
        state = {name: model.state_dict()[name] for name in before[0]}  # a tied weight once
        got = torch.func.functional_call(model, state, (), batch(family)).logits
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        assert torch.equal(got, want) and not torch.equal(want, plain)
        moved = torch.func.functional_call(model, zeros, (), batch(family)).logits
        assert not torch.equal(moved, want) and torch.equal(logits(model, **batch(family)), want)
    assert names(model) == before and dict(model.named_buffers()).keys() == buffers.keys()


def test_gate_training_adds_its_gates(llama, folders):
    before, state = names(llama), copy.deepcopy(llama.state_dict())
    with gated_model(llama, folders["ant"]) as gated:
        gates = [f"{path}.gate" for path in gated.layers]
        for had, has in zip(before, names(llama), strict=True):
            assert sorted(has) == sorted([*had, *gates])
        trained = {name: p + 1 for name, p in llama.state_dict().items()}
        assert not any(llama.load_state_dict(trained)) and torch.equal(gated.gates()[UP], torch.ones(32))
        llama.load_state_dict(state, strict=False)
    assert names(llama) == before


def test_a_checkpoint_saved_during_gate_training_is_the_model(llama, folders, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    data = [{key: value[0] for key, value in batch("llama", rows=1, labels=True, seed=i).items()} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, save_steps=2, learning_rate=0.1,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    plain = logits(llama, **batch("llama"))
    with gated_model(llama, folders["ant"]) as gated:
        Trainer(model=llama, args=arguments, train_dataset=data).train()
        want = gated.gates()
    loaded = type(llama).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(logits(loaded, **batch("llama")), plain)
    with gated_model(llama, folders["ant"]) as gated:
        arguments.max_steps = 2
        Trainer(model=llama, args=arguments, train_dataset=data).train(resume_from_checkpoint=True)
        assert all(torch.equal(gated.gates()[path], gate) for path, gate in want.items())
        assert want[UP].abs().sum() > 0


# ---- accelerate ------------------------------------------------------------------------------------------------------


def offload(model, where, folder):
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    if where == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=cpu)
    elif where == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb"), "cpu")
        places |= {"model.layers.0": "disk", "lm_head": "cpu"}
        accelerate.dispatch_model(model, places, offload_dir=str(folder), main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("first", ["patch", "offload"])
@pytest.mark.parametrize("where", ["disk", "cpu_offload", "dispatch"])
def test_offload_and_patch_in_either_order(llama, experts, tmp_path, where, first):
    hooks = pytest.importorskip("accelerate.hooks")
    plain = logits(llama, **batch("llama"))
    with moerge.patch(llama, experts):
        want = logits(llama, **batch("llama"))
    if first == "patch":
        handle = moerge.patch(llama, experts)
    offload(llama, where, tmp_path / "offload")
    if first == "offload":
        before = {name: set(vars(module)) for name, module in llama.named_modules()}
        handle = moerge.patch(llama, experts)
    assert llama.get_submodule(UP).weight.device.type == "meta"
    assert torch.equal(logits(llama, **batch("llama")), want)
    if where != "cpu_offload":  # transformers asks the map whether to gather
        llama.hf_device_map = getattr(llama, "hf_device_map", {"": "disk"})
        llama.save_pretrained(tmp_path / "saved")
        loaded = type(llama).from_pretrained(tmp_path / "saved")
        assert torch.equal(logits(loaded, **batch("llama")), plain)
    assert torch.equal(logits(copy.deepcopy(llama), **batch("llama")), want)
    handle.remove()
    assert torch.equal(logits(llama, **batch("llama")), plain)
    if first == "offload":
        after = {name: set(vars(module)) for name, module in llama.named_modules()}
        after[""] -= {"hf_device_map"} - before[""]
        assert after == before
    hooks.remove_hook_from_module(llama, recurse=True)
    assert llama.get_submodule(UP).weight.device.type == "cpu"
    assert torch.equal(logits(llama, **batch("llama")), plain)


def test_hooks_are_taken_off_a_patched_model(llama, experts, tmp_path):
    hooks = pytest.importorskip("accelerate.hooks")
    before, plain = snapshot(llama), logits(llama, **batch("llama"))
    offload(llama, "cpu_offload", tmp_path)
    with moerge.patch(llama, experts):
        want = logits(llama, **batch("llama"))
        hooks.remove_hook_from_module(llama, recurse=True)
        assert llama.get_submodule(UP).weight.device.type == "cpu"
        assert torch.equal(logits(llama, **batch("llama")), want)
    assert torch.equal(logits(llama, **batch("llama")), plain)
    assert snapshot(llama)["state"].keys() == before["state"].keys()


# ---- sharded ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("originals", [False, True])
def test_fsdp1(llama, experts, one_process, originals):
    from torch.distributed.fsdp import FullyShardedDataParallel

    keys = set(llama.state_dict())
    moerge.patch(llama, experts)
    want = logits(llama, **batch("llama"))
    sharded = FullyShardedDataParallel(llama, device_id=torch.device("cpu"), use_orig_params=originals)
    assert torch.equal(logits(sharded, **batch("llama")), want)
    assert set(sharded.state_dict()) == keys
    sharded(**batch("llama", labels=True)).loss.backward()
    assert all(p.grad is not None for p in sharded.parameters())


@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fsdp2(llama, experts, one_process, first):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    def shard():
        mesh = init_device_mesh("cpu", (1,))
        for layer in (*llama.model.layers, llama):
            fully_shard(layer, mesh=mesh)

    def sharded():
        for module in llama.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    full = {key: value.clone() for key, value in llama.state_dict().items()}
    plain, options = logits(llama, **batch("llama")), StateDictOptions(full_state_dict=True)
    with moerge.patch(llama, experts):
        want = logits(llama, **batch("llama"))
    if first == "shard":
        shard()
    handle = moerge.patch(llama, experts)
    if first == "patch":
        shard()
    assert torch.equal(logits(llama, **batch("llama")), want)
    sharded()
    set_model_state_dict(llama, {key: 2 * value for key, value in full.items()}, options=options)
    assert not torch.equal(logits(llama, **batch("llama")), want)
    sharded()
    set_model_state_dict(llama, dict(full), options=options)
    assert torch.equal(logits(llama, **batch("llama")), want)
    sharded()
    got = get_model_state_dict(llama, options=options)
    assert got.keys() == full.keys() and all(torch.equal(got[key], full[key]) for key in full)
    handle.remove()
    assert torch.equal(logits(llama, **batch("llama")), plain)


def test_data_parallel_replicas_have_their_own_base(llama, experts):
    """What DataParallel does to each module, without the GPUs that it wants."""
    moerge.patch(llama, experts)
    layer = llama.get_submodule(UP)
    replica, x = layer._replicate_for_data_parallel(), torch.randn(3, 32)
    want = layer(x)
    replica._parameters["bias"] = None
    replica.weight = 2 * layer.weight
    assert replica.base_layer is not layer.base_layer
    torch.testing.assert_close(replica(x) - want, layer.base_layer(x))
    assert torch.equal(layer(x), want)


# ---- layers with ways of their own -----------------------------------------------------------------------------------


class Quantized(nn.Module):
    """A layer as quantizers make them: int8 codes that its state dict calls otherwise, a scale that is a buffer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.moves = None, 0
        self.register_buffer("scale", scale)

    def _apply(self, fn, recurse=True):
        self.moves += 1
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.codes"] = destination.pop(prefix + "weight")

    def _load_from_state_dict(self, state, prefix, *args):
        state[prefix + "weight"] = state.pop(prefix + "weight.codes")
        super()._load_from_state_dict(state, prefix, *args)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.fixture
def quantized(llama):
    for layer in llama.model.layers:
        layer.mlp.up_proj = Quantized(layer.mlp.up_proj)
    return llama


def test_a_quantized_layer_keeps_its_ways(quantized, experts):
    before, plain, inputs = snapshot(quantized), logits(quantized, **batch("llama")), batch("llama")
    base = quantized.get_submodule(UP)
    handle = moerge.patch(quantized, experts)
    assert f"{UP}.weight.codes" in quantized.state_dict() and f"{UP}.scale" in dict(quantized.named_buffers())
    assert list(quantized.state_dict()) == list(before["state"])
    routed = logits(quantized, **inputs)
    changed = {key: value + 1 for key, value in quantized.state_dict().items()}
    quantized.load_state_dict(changed)
    assert torch.equal(base.weight, before["state"][f"{UP}.weight.codes"] + 1)
    quantized.load_state_dict(before["state"])
    assert torch.equal(logits(quantized, **inputs), routed)
    assert torch.equal(logits(copy.deepcopy(quantized), **inputs), routed)
    quantized.to(torch.bfloat16)
    layer = quantized.get_submodule(UP)
    assert base.moves == 1 and base.scale.dtype == layer.lora_A.dtype == torch.bfloat16
    assert base.weight.dtype == torch.int8 and layer.gates.dtype == torch.float32
    handle.remove()
    quantized.to(torch.float32).load_state_dict(before["state"])
    assert cases.error(logits(quantized, **inputs), plain) < 0.01  # the rotary table went through bfloat16
    assert snapshot(quantized)["attributes"] == before["attributes"]
    assert snapshot(quantized)["state"].keys() == before["state"].keys()


class Masked(nn.Linear):
    """A linear layer that uses names which the branch of experts uses too."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.register_buffer("mask", torch.ones_like(layer.weight).tril())
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.lora_A = nn.ModuleDict({"mine": nn.Linear(layer.in_features, layer.out_features)})

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask * self.gate) + 0.1 * self.lora_A["mine"](x)


def test_a_layer_with_names_of_ours_keeps_them(llama, experts, folders):
    with moerge.patch(llama, experts):
        layer, x = llama.get_submodule(UP), torch.randn(3, 32)
        branch = layer(x) - layer.base_layer(x)
    llama.model.layers[0].mlp.up_proj = base = Masked(llama.get_submodule(UP))
    before, plain = snapshot(llama), logits(llama, **batch("llama"))
    with moerge.patch(llama, experts):
        layer = llama.get_submodule(UP)
        torch.testing.assert_close(layer(x) - base(x), branch)
        assert list(llama.state_dict()) == list(before["state"]) and layer.lora_A.shape == (3, 4, 32)
        twin = copy.deepcopy(llama).double().float()
        assert torch.equal(logits(twin, **batch("llama")), logits(llama, **batch("llama")))
        layer.lora_A = 2 * layer.lora_A
        torch.testing.assert_close(layer(x) - base(x), 2 * branch)
        with torch.no_grad():
            torch.testing.assert_close(layer(x) - base(x), 2 * branch)
    assert cases.same(before, snapshot(llama)) and torch.equal(logits(llama, **batch("llama")), plain)
    with gated_model(llama, folders["ant"], joint=True) as gated:
        layer = gated.layers[UP]
        assert list(layer.trainable()) == ["lora_A", "lora_B", "gate"] and gated.gates()[UP].shape == (32,)
        llama(**batch("llama", labels=True)).loss.backward()
        assert layer.gate.grad.any() and layer.lora_A.shape == (4, 32) and base.gate.grad is None
    llama.zero_grad()
    assert cases.same(before, snapshot(llama))


@contextmanager
def parametrized(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    yield
    nn.utils.parametrize.remove_parametrizations(layer, "weight")


def test_a_layer_with_parts(llama, experts):
    with parametrized(llama.get_submodule(UP)):
        before, plain = names(llama), logits(llama, **batch("llama"))
        with moerge.patch(llama, experts):
            assert names(llama) == before
            assert not torch.equal(logits(llama, **batch("llama")), plain)
        assert names(llama) == before and torch.equal(logits(llama, **batch("llama")), plain)


def test_pruning_a_routed_layer(llama, experts):
    from torch.nn.utils import prune

    with moerge.patch(llama, experts):
        layer, x = llama.get_submodule(UP), torch.randn(3, 32)
        branch = layer(x) - layer.base_layer(x)
        prune.l1_unstructured(layer, "weight", 0.5)
        assert (layer.weight == 0).float().mean() == 0.5
        torch.testing.assert_close(layer(x), x @ layer.weight.T + branch)
    assert "weight_orig" in dict(llama.get_submodule(UP).named_parameters())
