"""Training an expert: a PEFT folder comes out, the model stays as it was."""

from __future__ import annotations

import pytest
import torch
from gate_builders import (
    MODELS,
    Killed,
    Untouched,
    batches,
    breaking,
    llama,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from safetensors.torch import load_file

from moerge_ext.experts.formats.peft import read_adapter
from moerge_ext.training.experts import train_expert

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_train_expert(name, tmp_path):
    model = MODELS[name]()
    untouched = Untouched(model)
    model_out = train_expert(model, batches(), tmp_path / "e", alpha=16, **quiet(steps=15, lr=0.01))
    untouched.check()
    assert model_out.losses[-1] < model_out.losses[0] - 0.2
    adapter = read_adapter("e", tmp_path / "e")
    linears = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert set(linears) - adapter.modules.keys() == {"lm_head"}
    assert all(module.lora_A.shape[0] == 16 for module in adapter.modules.values())
    assert sorted(p.name for p in (tmp_path / "e").iterdir() if p.name.startswith(".")) == []
    assert len({p.stat().st_mode for p in (tmp_path / "e").iterdir()}) == 1  # safetensors writes private files


def test_autocast_of_the_caller_sees_every_step(tmp_path):
    """autocast keeps casts of weights until its end: with those of the first step no later loss would change."""
    data = batches(count=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = train_expert(llama(), data, tmp_path / "inside", alpha=16, **quiet(steps=8, lr=0.01))
    outside = train_expert(llama(), data, tmp_path / "outside", alpha=16, **quiet(steps=8, lr=0.01))
    assert inside.losses[-1] == pytest.approx(outside.losses[-1], abs=0.05)
    assert outside.losses[-1] < outside.losses[0] - 0.2


def test_train_expert_resumes_and_restores_the_model(tmp_path):
    data, options = batches(count=5), quiet(rank=2, checkpoint_every=2, lr=0.01)
    train_expert(llama(), data, tmp_path / "through", **options)
    model = llama()
    model.gradient_checkpointing_enable()
    untouched = Untouched(model)
    with pytest.raises(Killed):
        train_expert(model, breaking(data, after=5), tmp_path / "out", **options)
    untouched.check()
    train_expert(model, data, tmp_path / "out", resume=True, **options)
    untouched.check()
    file = "adapter_model.safetensors"
    got, expected = load_file(tmp_path / "out" / file), load_file(tmp_path / "through" / file)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
