"""Wrappers: DistributedDataParallel is looked through, FSDP1 refused for training, accelerate may offload the base."""

from __future__ import annotations

import pytest
import torch
from builders import random_experts, tiny_llama
from safetensors.torch import load_file
from torch import distributed, nn

import moerge_ext as moerge
from moerge_ext.models.wrappers import trainable_inside, unwrapped

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def group():
    """A process group of this process alone, which DistributedDataParallel needs."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_patch_and_handle(wrapper, group, tmp_path):
    model = tiny_llama()
    experts = moerge.load_experts(random_experts(model, tmp_path, "ab", TARGETS))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        base = model(ids).logits
        with moerge.patch(model, experts, "phatgoose"):
            routed = model(ids).logits
        outside = WRAPPERS[wrapper](model)
        assert unwrapped(outside) is trainable_inside(outside) is model
        torch.testing.assert_close(outside(ids).logits, base)
        handle = moerge.patch(outside, experts, "phatgoose")
        assert handle.model is model
        assert moerge.get_handle(outside) is moerge.get_handle(model) is handle
        torch.testing.assert_close(outside(ids).logits, routed)
        handle.remove()
        torch.testing.assert_close(outside(ids).logits, base)
    with pytest.raises(ValueError, match="not patched"):
        moerge.get_handle(outside)


def test_fsdp1_is_refused_for_training(group, tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
    folder = random_experts(tiny_llama(), tmp_path, "a", TARGETS)["a"]
    for train in (
        lambda: moerge.train_gates(model, folder, [{}]),
        lambda: moerge.average_activation(model, folder, [{}]),
        lambda: moerge.train_expert(model, [{}], tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match="flattens the weights.*fully_shard"):
            train()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_an_offloaded_base(where, joint, tmp_path):
    """The hooks fetch and drop the base's weights, and leave what is trained where it is."""
    accelerate = pytest.importorskip("accelerate")
    ids, options = torch.arange(3, 9)[None], {"execution_device": "cpu"}
    options |= {"offload_dir": str(tmp_path / "disk")} if where == "disk_offload" else {}
    found = []
    for offload in (False, True):
        model = tiny_llama()
        folder = random_experts(model, tmp_path / str(offload), "a", TARGETS, gates=False)["a"]
        want = model(ids).logits
        if offload:
            getattr(accelerate, where)(model, **options)
        result = moerge.train_gates(
            model, folder, [{"input_ids": ids, "labels": ids}], steps=3, lr=0.1, joint=joint, progress=False,
            output_dir=tmp_path / f"gates {offload}",
        )  # fmt: skip
        assert result.losses[-1] < result.losses[0]
        found.append(load_file(tmp_path / f"gates {offload}" / "moerge_gates.safetensors"))
        assert torch.equal(model(ids).logits, want)
        assert {p.device.type for p in model.parameters()} == {"meta" if offload else "cpu"}
    assert all(value.any() and torch.allclose(value, found[1][key], atol=1e-6) for key, value in found[0].items())
