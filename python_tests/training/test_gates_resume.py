"""A run that is killed leaves nothing half-written and goes on as if it had not been."""

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
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from safetensors.torch import load_file

from moerge_ext.training.gates import CHECKPOINT_FOLDER, train_gates
from moerge_ext.training.state import STATE_FILE, TrainingState

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(llama(), tmp_path / "expert")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("joint", [False, True])
def test_resume_equals_a_run_without_a_break(name, joint, tmp_path):
    folder, data = make_adapter(MODELS[name](), tmp_path / "expert"), batches(count=5)
    options = quiet(steps=7, accumulate=2, checkpoint_every=2, eval_every=3, validation=batches(seed=5))
    options |= {"joint": joint, "lr": 0.02}
    through = train_gates(MODELS[name](), folder, data, output_dir=tmp_path / "through", **options)

    model, out = MODELS[name](), tmp_path / "out"
    untouched = Untouched(model)
    with pytest.raises(Killed):
        train_gates(model, folder, breaking(data, after=11), output_dir=out, **options)
    untouched.check()
    assert [f.name for f in (out / CHECKPOINT_FOLDER).iterdir()] == [STATE_FILE]
    assert [f.name for f in out.iterdir()] == [CHECKPOINT_FOLDER]  # no half-written result
    torch.manual_seed(1234)  # another process has another global generator
    resumed = train_gates(model, folder, data, output_dir=out, resume=True, **options)
    assert (resumed.losses, resumed.validation) == (through.losses, through.validation)
    files = {f.name for f in (tmp_path / "through").iterdir()}
    assert {f.name for f in out.iterdir()} == files and CHECKPOINT_FOLDER not in files
    for file in files - {"adapter_config.json"}:
        got, expected = load_file(out / file), load_file(tmp_path / "through" / file)
        assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_resume_refuses_another_run(adapter):
    data = batches()
    with pytest.raises(Killed):
        train_gates(llama(), adapter, breaking(data, after=3), checkpoint_every=1, **quiet())
    with pytest.raises(ValueError, match=r"lr: saved with 0.005, now 0.1(.|\n)*steps: saved with 6, now 7"):
        train_gates(llama(), adapter, data, resume=True, **quiet(steps=7, lr=0.1))
    state = adapter / CHECKPOINT_FOLDER / STATE_FILE
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        train_gates(llama(), adapter, data, resume=True, **quiet())
    train_gates(llama(), adapter, data, **quiet())  # without resume: from the start
    assert not state.parent.exists()


def test_a_failed_write_leaves_the_old_state(tmp_path, monkeypatch):
    path = tmp_path / "file"
    TrainingState({"lr": 1.0}, step=1, losses=[0.5]).write(path)
    old = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        TrainingState({"lr": 1.0}, step=2, losses=[0.5, 0.25]).write(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
