"""A run from its rows to its end: text encoded, interrupted, finished before, and a disk that refuses."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from builders import make_tokenizer
from gate_builders import (
    Untouched,
    batches,
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
    t5,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moerge_ext.experts.gates import read_gates
from moerge_ext.files import atomic
from moerge_ext.models.prompt import PromptFormat
from moerge_ext.training import experts, state
from moerge_ext.training.activation import average_activation
from moerge_ext.training.encoding import Encoder, collator
from moerge_ext.training.experts import train_expert
from moerge_ext.training.gates import train_gates

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ROWS = [{"input": f"copy {c}:", "target": c * 3} for c in "abcdef"]
FULL = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(llama(), tmp_path / "a")


def runs(tmp_path, adapter):
    """{name: a call of a training function with these options}, each on a model of its own, and what it writes."""
    return {
        "gates": (
            lambda data, **o: train_gates(llama(), adapter, data, **quiet(checkpoint_every=100, **o)),
            adapter / "moerge_gates.safetensors",
        ),
        "expert": (
            lambda data, **o: train_expert(llama(), data, tmp_path / "e", **quiet(rank=2, **o)),
            tmp_path / "e" / "adapter_model.safetensors",
        ),
    }


def test_rows_of_text(tokenizer, adapter, tmp_path):
    model = llama()
    untouched = Untouched(model)
    result = train_expert(model, ROWS, tmp_path / "e", tokenizer=tokenizer, validation=ROWS, **quiet(rank=2, lr=0.02))
    untouched.check()
    assert result.validation[6] < result.validation[0]
    features, collate = Encoder(model, tokenizer).features(ROWS), collator(tokenizer)
    train_expert(model, features, tmp_path / "f", collate_fn=collate, validation=features, **quiet(rank=2, lr=0.02))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ef")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    train_gates(model, adapter, [*ROWS, {"text": "abc"}], tokenizer=tokenizer, max_length=6, **quiet())
    average_activation(model, adapter, ROWS, tokenizer=tokenizer, progress=False)
    assert read_gates(adapter).keys() == {"sigmoid-gate", "average-activation"}


def test_what_does_not_fit_is_said_at_once(tokenizer, adapter, tmp_path):
    for train in (
        lambda data, **o: train_expert(llama(), data, tmp_path / "e", **o),
        lambda data, **o: train_gates(llama(), adapter, data, **o),
        lambda data, **o: average_activation(llama(), adapter, data, **o),
    ):
        with pytest.raises(ValueError, match=r"rows of text \(keys \['input', 'target'\]\): pass tokenizer="):
            train(ROWS)
        with pytest.raises(ValueError, match="not both"):
            train(ROWS, tokenizer=tokenizer, collate_fn=len)
        with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
            train(ROWS, tokenizer=tokenizer, max_length=1)
        with pytest.raises(ValueError, match=r"row 1 \(from 0\): .*got keys \['prompt'\](.|\n)*row 2 .*got int"):
            train([ROWS[0], {"prompt": "a"}, 3], tokenizer=tokenizer)
        with pytest.raises(ValueError, match="there are no rows"):
            train([], tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r'row 0 .*: an encoder-decoder model needs rows with "input" and "target"'):
        train_expert(t5(), [{"text": "a"}], tmp_path / "e", tokenizer=tokenizer)
    assert not (tmp_path / "e").exists()


def test_the_encoder_counts_what_it_cuts(tokenizer):
    encoder = Encoder(llama(), tokenizer, 9)
    assert [len(f["input_ids"]) for f in encoder.features([*ROWS[:2], {"text": "a"}])] == [9, 9, 2]
    assert encoder.cut == 2
    assert Encoder(llama(), tokenizer, 1000).length == 64  # the model has no more positions


def test_rows_that_fail_alike_are_one_line(tokenizer):
    encoder = Encoder(llama(), tokenizer, 9, PromptFormat("{instruction} {input}"))
    with pytest.raises(
        ValueError, match=r"\n- rows 0, 1, 2 and 61 more \(from 0\): the template asks for \{instruction\}"
    ) as caught:
        encoder.features([{"input": "a", "target": "b"}] * 64)
    assert str(caught.value).count("\n") == 1


def interrupting(data, after):
    """The batches of `data`; Ctrl-C while number `after` is fetched."""

    class Source:
        def __iter__(self):
            for i in range(100):
                if i == after:
                    os.kill(os.getpid(), signal.SIGINT)
                yield data[i % len(data)]

    return Source()


@pytest.mark.parametrize("name", ["gates", "expert"])
def test_an_interrupt_keeps_the_steps_between_checkpoints(name, adapter, tmp_path):
    run, file = runs(tmp_path, adapter)[name]
    data = batches(count=3)
    through = run(data)
    expected = load_file(file)
    file.unlink()
    with pytest.raises(KeyboardInterrupt) as caught:
        run(interrupting(data, after=4))
    assert "the state after step 4 is kept in" in caught.value.__notes__[0] and not file.exists()
    resumed = run(data, resume=True)
    assert resumed.losses == through.losses and not resumed.already
    assert all(torch.equal(load_file(file)[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["gates", "expert"])
def test_a_finished_run_is_known(name, adapter, tmp_path):
    run, file = runs(tmp_path, adapter)[name]
    data = batches(count=3)
    first = run(data, validation=data, resume=True)
    before = file.stat().st_mtime_ns
    again = run(data, validation=data, resume=True)
    assert again.already and not first.already and file.stat().st_mtime_ns == before
    assert (again.path, again.losses, again.validation) == (first.path, first.losses, first.validation)
    for options, said in (
        ({}, ""),
        ({"resume": True, "lr": 0.1}, r", of other settings \(lr: saved with .*, now 0.1\)"),
    ):
        way_out = r": pass overwrite=True \(--overwrite\) to replace it, or name another folder"
        with pytest.raises(ValueError, match=f"^{file} is there already{said}{way_out}"):
            run(data, validation=data, overwrite=False, **options)
        assert file.stat().st_mtime_ns == before
    assert not run(data, validation=data).already  # overwritten, without resume: anew
    assert not run(data, validation=data, resume=True, lr=0.1).already  # another run


def test_other_rows_are_another_run(tokenizer, tmp_path):
    options = quiet(rank=2, tokenizer=tokenizer, resume=True)
    assert not train_expert(llama(), ROWS, tmp_path / "e", **options).already
    assert train_expert(llama(), ROWS, tmp_path / "e", **options).already
    assert not train_expert(llama(), ROWS[::-1], tmp_path / "e", **options).already


def test_a_full_disk_ends_no_run_and_loses_no_step(adapter, tmp_path, monkeypatch):
    data, options = batches(count=3), quiet(rank=2, checkpoint_every=2)
    calls = []

    def full(tensors, file, metadata):
        calls.append(file)
        if len(calls) > 1:
            Path(file).write_bytes(b"half")
            raise FULL
        save_file(tensors, file, metadata)

    monkeypatch.setattr(state, "save_file", full)
    monkeypatch.setattr(experts, "save_file", full)
    kept = tmp_path / "e" / ".moerge-train-expert" / "moerge_expert.checkpoint.safetensors"
    with (
        pytest.warns(UserWarning, match=f"after step 4 is not kept .*No space left.*after step 2 is kept in {kept}"),
        pytest.raises(OSError, match="No space left.*; the state after step 2 is kept in .*resume=True") as caught,
    ):
        train_expert(llama(), data, tmp_path / "e", **options)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "e")
    assert ".tmp" not in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "e").rglob("*")) == [kept.parent, kept]
    monkeypatch.undo()
    through = train_expert(llama(), data, tmp_path / "through", **options)
    assert train_expert(llama(), data, tmp_path / "e", resume=True, **options).losses == through.losses


def test_what_the_disk_refuses_names_the_path_that_was_asked_for(adapter, tmp_path, monkeypatch):
    old = adapter / "moerge_gates.safetensors"
    train_gates(llama(), adapter, batches(), **quiet())
    content = old.read_bytes()
    monkeypatch.setattr("moerge_ext.experts.gates.save_file", lambda *a, **k: (_ for _ in ()).throw(FULL))
    with pytest.raises(OSError, match="No space left.*step 6 is kept in .*moerge_gates.safetensors'$"):
        train_gates(llama(), adapter, batches(), **quiet())
    assert old.read_bytes() == content and not list(adapter.glob(".*.tmp"))
    with pytest.raises(OSError, match="No space left.*average-activation.safetensors'$"):
        average_activation(llama(), adapter, batches(), progress=False)
    with pytest.raises(ValueError, match="not the disk"):
        atomic.write_atomically(tmp_path / "x", lambda _: (_ for _ in ()).throw(ValueError("not the disk")))


def test_a_folder_that_cannot_be_written_is_said_before_any_work(adapter, tmp_path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out"
    data = iter([])  # never read
    for train in (
        lambda: train_expert(llama(), data, target, **quiet()),
        lambda: train_gates(llama(), adapter, data, output_dir=target, **quiet()),
        lambda: average_activation(llama(), adapter, data, output_dir=target, progress=False),
    ):
        with pytest.raises(NotADirectoryError, match=str(target)):
            train()


@pytest.mark.parametrize("kind", ["gates", "expert"])
def test_gradients_that_the_caller_has_switched_off(kind, tmp_path):
    data = batches()
    folder = make_adapter(llama(), tmp_path / "adapter")

    def losses(name: str) -> list[float]:
        model, options = llama(), quiet(lr=0.05)
        untouched = Untouched(model)
        try:
            if kind == "gates":
                return train_gates(model, folder, data, output_dir=tmp_path / name, **options).losses
            return train_expert(model, data, tmp_path / name, **options).losses
        finally:
            untouched.check()

    want = losses("on")
    with torch.no_grad():
        assert losses("off") == want
        assert not torch.is_grad_enabled()
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode.*leave that block"):
        losses("inference")
