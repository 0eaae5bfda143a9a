"""Gates for some modules of an adapter: as if it had no others."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from gate_builders import batches, llama, make_adapter, one_thread, quiet  # noqa: F401 (one_thread: by being here)
from safetensors.torch import load_file, save_file

import moerge_ext as moerge
from moerge_ext.experts.formats.peft import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.gates import train_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
ONLY = r"self_attn\.q_proj"


@pytest.fixture
def adapters(tmp_path):
    """(an adapter, the same with one kind of its modules)"""
    whole, part = make_adapter(llama(), tmp_path / "whole"), tmp_path / "part"
    part.mkdir()
    tensors = load_file(whole / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if ".self_attn.q_proj." in key}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, part / "adapter_model.safetensors")
    config = json.loads((whole / "adapter_config.json").read_text()) | {"target_modules": ["q_proj"]}
    (part / "adapter_config.json").write_text(json.dumps(config))
    return whole, part


@pytest.mark.parametrize("kind", ["sigmoid-gate", "average-activation"])
def test_the_others_are_as_if_they_were_not_there(adapters, kind):
    whole, part = adapters
    for folder, more in ((whole, {"modules": ONLY}), (part, {})):
        if kind == "sigmoid-gate":
            train_gates(llama(), folder, batches(), **quiet(lr=0.05), **more)
        else:
            average_activation(llama(), folder, batches(), progress=False, **more)
    got, want = (read_gates(folder)[kind].gates for folder in adapters)
    assert got.keys() == want.keys() and all(torch.equal(got[path], want[path]) for path in want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as gates of an adapter whose weights have changed
        experts = moerge.load_experts([whole], modules=ONLY)
    assert experts.get_gates("whole", kind).keys() == want.keys() == experts.modules.keys()


def test_a_run_with_other_modules_is_another_run(adapters):
    whole, _ = adapters
    train_gates(llama(), whole, batches(), **quiet(), modules=ONLY)
    assert train_gates(llama(), whole, batches(), **quiet(), modules=lambda path: "q_proj" in path, resume=True).already
    with pytest.raises(ValueError, match=r"modules: saved with '\d \(\w+\)', now None"):
        train_gates(llama(), whole, batches(), **quiet() | {"overwrite": False}, resume=True)


def test_what_cannot_be_left_out(adapters, tmp_path):
    whole, _ = adapters
    with pytest.raises(ValueError, match=r"modules='nope' takes none of the \d+ of 'whole', as "):
        train_gates(llama(), whole, batches(), **quiet(), modules="nope")
    with pytest.raises(ValueError, match="joint training .* writes a whole adapter"):
        train_gates(llama(), whole, batches(), **quiet(), modules=ONLY, joint=True, output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="regular expression"):
        average_activation(llama(), whole, batches(), modules="(", progress=False)
