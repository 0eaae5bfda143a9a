"""Training gates: what is learned, kept, refused, and left alone."""

from __future__ import annotations

import pytest
import torch
from gate_builders import (
    MODELS,
    Untouched,
    batches,
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)

from moerge_ext.experts.formats.peft import read_adapter, read_gates
from moerge_ext.training.experts import new_expert
from moerge_ext.training.gated_lora import gated_model
from moerge_ext.training.gates import CHECKPOINT_FOLDER, train_gates
from moerge_ext.training.options import TrainingOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(llama(), tmp_path / "expert")


def test_training_lowers_the_loss_and_touches_nothing_else(adapter):
    model, data = llama(), batches()
    untouched, lora = Untouched(model), (adapter / "adapter_model.safetensors").read_bytes()
    result = train_gates(model, adapter, data, validation=data, **quiet(steps=30, lr=0.05))
    untouched.check()
    assert (adapter / "adapter_model.safetensors").read_bytes() == lora
    assert result.validation.keys() == {0, 30} and result.best_step == 30
    assert result.validation[30] < result.validation[0] - 0.02
    assert len(result.losses) == 30
    gates = read_gates(adapter)["sigmoid-gate"]
    modules = read_adapter("e", adapter).modules
    assert gates.gates.keys() == modules.keys()
    assert all(g.dtype == torch.float32 and g.abs().max() > 0 for g in gates.gates.values())
    assert {"steps": "30", "lr": "0.05", "seed": "0", "joint": "false"}.items() <= gates.metadata.items()
    assert not (adapter / CHECKPOINT_FOLDER).exists()
    assert sorted(f.name for f in adapter.iterdir() if f.name.startswith(".")) == []


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_other_architectures(name, tmp_path):
    model = MODELS[name]()
    folder = make_adapter(model, tmp_path / "expert")
    untouched = Untouched(model)
    train_gates(model, folder, batches(), **quiet(lr=0.05))
    untouched.check()
    gates = read_gates(folder)["sigmoid-gate"].gates
    path, size = {
        "gpt2": ("transformer.h.0.mlp.c_proj", 64),
        "t5": ("decoder.block.0.layer.1.EncDecAttention.k", 16),
    }[name]
    assert gates[path].shape == (size,)
    assert all(g.abs().max() > 0 for g in gates.values())


def test_bfloat16_model(adapter):
    model = llama().bfloat16()
    untouched = Untouched(model)
    result = train_gates(model, adapter, batches(), **quiet(steps=30, lr=0.05))
    untouched.check()
    assert result.losses[-4] < result.losses[1] and read_gates(adapter)["sigmoid-gate"].gates


def test_schedule():
    options = TrainingOptions(steps=100, lr=1.0)
    assert [options.rate(i) for i in (0, 2, 5, 6, 99)] == pytest.approx([1 / 6, 0.5, 1, 1, 1])
    assert TrainingOptions(steps=5, lr=1.0, warmup_ratio=0).rate(0) == 1.0


def test_the_rate_warms_up(adapter):
    # AdamW's first steps on one batch are the rate itself: 0.005 + 0.01
    train_gates(llama(), adapter, batches(count=1), warmup_ratio=1.0, **quiet(steps=2, lr=0.01))
    gates = torch.cat(list(read_gates(adapter)["sigmoid-gate"].gates.values())).abs()
    assert gates.max().item() == pytest.approx(0.015, rel=0.02)


def test_accumulated_batches_are_one_large_batch(adapter):
    data = batches(count=4)
    large = {key: torch.cat([b[key] for b in data]) for key in data[0]}
    small = train_gates(llama(), adapter, data, accumulate=4, **quiet(steps=3))
    small_gates = read_gates(adapter)["sigmoid-gate"].gates
    whole = train_gates(llama(), adapter, [large], **quiet(steps=3))
    assert small.losses == pytest.approx(whole.losses, rel=1e-5)
    for path, gate in read_gates(adapter)["sigmoid-gate"].gates.items():
        torch.testing.assert_close(gate, small_gates[path], rtol=1e-3, atol=1e-5)


def test_features_with_collate_fn_are_shuffled_by_seed(adapter):
    rows = [{key: value[0] for key, value in b.items()} for b in batches(count=6, rows=1)]
    seen = []

    def collate(features):
        seen.append(tuple(int(f["input_ids"][0]) for f in features))
        return {key: torch.stack([f[key] for f in features]) for key in features[0]}

    def run(**options):
        seen.clear()
        train_gates(llama(), adapter, rows, collate_fn=collate, batch_size=4, **quiet(steps=4, **options))
        return list(seen)

    in_order = run(shuffle=False)
    assert [len(b) for b in in_order] == [4, 2, 4, 2] and in_order[:2] == in_order[2:]
    shuffled = run(seed=1)
    assert shuffled == run(seed=1) != in_order and shuffled[:2] != shuffled[2:]
    assert sorted(sum(shuffled[:2], ())) == sorted(sum(in_order[:2], ()))


def test_validation_chooses_the_checkpoint(adapter):
    model, data = llama(), batches()
    # a rate far too high: what comes later is worse
    result = train_gates(model, adapter, data, validation=batches(seed=9), eval_every=2, **quiet(steps=5, lr=50.0))
    assert result.validation.keys() == {0, 2, 4, 5}
    assert result.best_step == min((2, 4, 5), key=result.validation.get)
    assert read_gates(adapter)["sigmoid-gate"].metadata["best_step"] == str(result.best_step)
    with gated_model(model, adapter) as gated, torch.no_grad():
        stored = read_gates(adapter)["sigmoid-gate"].gates
        gated.restore({f"{path}/gate": gate for path, gate in stored.items()})
        model.eval()
        losses = [model(**b).loss.item() for b in batches(seed=9)]
    assert sum(losses) / len(losses) == pytest.approx(result.validation[result.best_step], rel=1e-6)


def test_joint_trains_both_from_a_new_expert(tmp_path):
    model, data = llama(), batches()
    untouched = Untouched(model)
    start = new_expert(model, tmp_path / "start", rank=4, alpha=4)
    before = {file.name: file.read_bytes() for file in start.iterdir()}
    result = train_gates(model, start, data, joint=True, output_dir=tmp_path / "out", **quiet(steps=40, lr=0.05))
    untouched.check()
    assert result.losses[-1] < result.losses[0] - 0.2
    assert {file.name: file.read_bytes() for file in start.iterdir()} == before
    trained = read_adapter("out", tmp_path / "out")
    assert trained.modules.keys() == read_adapter("start", start).modules.keys()
    assert all(m.lora_B.abs().max() > 0 for m in trained.modules.values())
    assert read_gates(tmp_path / "out")["sigmoid-gate"].metadata["joint"] == "true"
    with gated_model(model, start, joint=True) as gated, pytest.raises(ValueError, match="in which folder"):
        gated.callback()
    # what was written is what was trained
    with gated_model(model, tmp_path / "out") as gated, torch.no_grad():
        gates = read_gates(tmp_path / "out")["sigmoid-gate"].gates
        gated.restore({f"{path}/gate": gate for path, gate in gates.items()})
        assert model(**data[0]).loss.item() < result.losses[0] - 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\]"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"joint": True}, "pass output_dir"),
        ({"data": []}, "data is empty"),
        ({"data": iter([])}, "data is empty"),
        ({"data": 3}, "data must be an iterable"),
        ({"data": [1]}, "a batch must be a dict"),
        ({"data": (b for b in batches(2))}, "ended after 2 batches"),
        ({"validation": []}, "validation is empty"),
        (
            {"data": [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]},
            "the model returned no loss: .*labels",
        ),
    ],
)
def test_refuses_arguments(options, message, adapter):
    model, arguments = llama(), quiet() | {"data": batches()} | options
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=message):
        train_gates(model, adapter, **arguments)
    untouched.check()
    assert read_gates(adapter) == {}


def test_refuses_a_loss_that_is_not_finite(adapter):
    model = llama()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train_gates(model, adapter, batches(), **quiet())


def test_trainer_callback(adapter, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = llama()
    untouched = Untouched(model)
    rows = [{key: value[0] for key, value in b.items()} for b in batches(count=8, rows=1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=4,
        learning_rate=0.02,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    with gated_model(model, adapter) as gated:
        callback = gated.callback()
        Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]).train()
        kept = gated.gates()
    stored = read_gates(adapter)["sigmoid-gate"]
    assert callback.best_step == 4 and stored.metadata["best_step"] == "4"
    assert all(torch.equal(stored.gates[path], gate) and gate.abs().max() > 0 for path, gate in kept.items())
    model.zero_grad()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in untouched.state.items())
    assert list(model.named_modules()) == untouched.modules
