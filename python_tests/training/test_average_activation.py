"""Average activations against a mean taken by hand."""

from __future__ import annotations

import inspect
import random

import pytest
import torch
from gate_builders import (
    Untouched,
    batches,
    llama,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    t5,
)

from moerge_ext.experts.formats.peft import read_gates
from moerge_ext.training.activation import average_activation, drawn
from moerge_ext.training.gated_lora import gated_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(llama(), tmp_path / "expert")


def test_average_activation_is_the_mean_over_real_tokens(adapter):
    model, data = llama(), batches(count=2)
    data[0]["attention_mask"][0, :3] = 0
    data[1]["attention_mask"][1, 5:] = 0
    del data[1]["labels"]
    untouched = Untouched(model)
    path = average_activation(model, adapter, data, progress=False)
    untouched.check()
    stored = read_gates(adapter)["average-activation"]
    assert path.exists() and stored.metadata["tokens"] == "26"

    from peft import PeftModel

    expected: dict[str, list] = {name: [] for name in stored.gates}
    peft_model = PeftModel.from_pretrained(model, adapter).eval()
    for name, rows in expected.items():
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        layer.register_forward_pre_hook(lambda _m, args, rows=rows: rows.append(args[0].double()))
    with torch.no_grad():
        for batch in data:
            peft_model(**batch)
    for name, rows in expected.items():
        real = torch.cat([u[b["attention_mask"].bool()] for u, b in zip(rows, data, strict=True)])
        torch.testing.assert_close(stored.gates[name], real.mean(0).float(), rtol=1e-5, atol=1e-6)


def test_average_activation_of_an_encoder_decoder(tmp_path):
    model = t5()
    folder = make_adapter(model, tmp_path / "expert")
    # source and target equally long: their masks must not be mixed up
    batch = batches(count=1)[0]
    batch["attention_mask"][0, 5:] = 0
    batch["labels"][1, 3:] = -100
    encoder, decoder = batch["attention_mask"].bool(), batch["labels"] != -100
    inputs: dict[str, torch.Tensor] = {}
    with gated_model(model, folder, gate=False) as gated, torch.no_grad():
        for name, layer in gated.layers.items():
            layer.register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        model.eval()
        model(**batch)
    average_activation(model, folder, [batch], progress=False)
    stored = read_gates(folder)["average-activation"].gates
    for name, gate in stored.items():
        cross = "EncDecAttention" in name and name[-1] in "kv"
        real = inputs[name][encoder if name.startswith("encoder") or cross else decoder]
        torch.testing.assert_close(gate, real.mean(0), rtol=1e-5, atol=1e-6)


def test_a_thousand_random_rows_are_enough(adapter, monkeypatch):
    """Of features and of rows of text; the same ones that the index of the baseline Retrieval draws."""
    rows = [{key: value[0] for key, value in b.items()} for b in batches(count=9, rows=1)]
    for row in rows:
        row["attention_mask"] = torch.ones_like(row["input_ids"])

    def collate(part):
        return {key: torch.stack([row[key] for row in part]) for key in part[0]}

    assert inspect.signature(average_activation).parameters["samples"].default == 1000

    def means(data, **options):
        average_activation(llama(), adapter, data, collate_fn=collate, progress=False, overwrite=True, **options)
        return read_gates(adapter)["average-activation"]

    few = means(rows, samples=4, seed=3)
    assert few.metadata["samples"] == "4" and few.metadata["seed"] == "3"
    chosen = random.Random(3).sample(rows, 4)
    by_hand = means(chosen, samples=None)
    assert all(torch.equal(few.gates[path], gate) for path, gate in by_hand.gates.items())
    every = means(rows)
    assert every.metadata["samples"] == "9" and any((every.gates[p] - g).any() for p, g in few.gates.items())
    with pytest.raises(ValueError, match="samples must be at least 1, or None for all, got 0"):
        means(rows, samples=0)
    assert len(drawn(range(9), 5, 0, parts=2)) == 3


def test_average_activation_refuses_nothing_seen(adapter):
    with pytest.raises(ValueError, match="at least one batch"):
        average_activation(llama(), adapter, iter([]), progress=False)
    batch = batches(count=1)[0]
    batch["attention_mask"][:] = 0
    with pytest.raises(ValueError, match="saw no token"):
        average_activation(llama(), adapter, [batch], progress=False)
