"""Training leaves the base as it was: parameters, buffers, modes and random numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from gate_builders import (
    Untouched,
    batches,
    gpt2,
    make_adapter,
    one_thread,  # noqa: F401 (used by being here)
    quiet,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moerge_ext.experts.gates import read_gates
from moerge_ext.training.activation import average_activation
from moerge_ext.training.experts import train_expert
from moerge_ext.training.frozen import frozen
from moerge_ext.training.gated_lora import gated_model
from moerge_ext.training.gates import train_gates

WIDTH = 6


class Norm(nn.BatchNorm1d):
    """Batch normalization, over the tokens."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


class Codebook(nn.Module):
    """An average that follows the data in training, written as published codebooks do, past autograd's sight."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            self.mean.data.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return x - self.mean


class Observer(nn.Module):
    """Ranges that widen in every mode, as of a quantizer that is being calibrated, and a count of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.tensor(0.0), persistent=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        self.seen += x.shape[0]
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return x / (1 + self.largest)


class Table(nn.Module):
    """A cache that is replaced by a longer one and notes its length; another that appears."""

    def __init__(self):
        super().__init__()
        self.length = 2
        self.register_buffer("table", torch.arange(2.0), persistent=False)

    def forward(self, x):
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.register_buffer("table", torch.arange(float(self.length)) / self.length, persistent=False)
            self.register_buffer("extra", torch.ones(1), persistent=False)
        return x + self.table[: x.shape[1], None]


def spectral():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))


def old_spectral():
    return nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH))


MOVING = {
    "batch norm": lambda: Norm(WIDTH),
    "cumulative batch norm": lambda: Norm(WIDTH, momentum=None),
    "instance norm": lambda: nn.Sequential(nn.InstanceNorm1d(8, track_running_stats=True)),
    "codebook": Codebook,
    "observer": Observer,
    "table": Table,
    "spectral norm": spectral,
    "old spectral norm": old_spectral,
}


class Model(nn.Module):
    """Linear layers around a module that moves; `model(x=, labels=).loss`."""

    main_input_name = "x"

    def __init__(self, moving):
        super().__init__()
        self.first, self.moving, self.last = nn.Linear(WIDTH, WIDTH), moving, nn.Linear(WIDTH, WIDTH)

    def forward(self, x, labels=None):
        y = self.last(torch.tanh(self.moving(self.first(x))))
        return SimpleNamespace(loss=None if labels is None else (y - labels).square().mean())


def build(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(MOVING[kind]()).train()


def data(rows=2, length=8, count=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(rows, length, WIDTH, generator=generator) + 0.5  # noqa: E731
    return [{"x": draw(), "labels": draw()} for _ in range(count)]


TARGETS = ["first", "last"]


def adapter_for(model, folder):
    from builders import write_adapter

    generator = torch.Generator().manual_seed(1)
    factors = {
        path: (torch.randn(2, WIDTH, generator=generator), torch.randn(WIDTH, 2, generator=generator))
        for path in TARGETS
    }
    return write_adapter(folder, factors, r=2, alpha=2)


@pytest.mark.parametrize("kind", MOVING)
def test_training_leaves_the_base_bit_identical(kind, tmp_path):
    model = build(kind)
    folder = adapter_for(model, tmp_path / "a")
    untouched = Untouched(model)
    train_gates(model, folder, data(), validation=data(), **quiet(lr=0.05))
    untouched.check()
    train_expert(model, data(), tmp_path / "e", rank=2, target_modules=TARGETS, **quiet())
    untouched.check()
    average_activation(model, folder, data(), progress=False)
    untouched.check()
    if kind == "table":
        assert (model.moving.length, model.moving.table.tolist()) == (2, [0.0, 1.0])


@pytest.mark.parametrize("kind", ["batch norm", "codebook", "spectral norm", "old spectral norm"])
def test_what_is_trained_for_is_the_base_in_eval_mode(kind, tmp_path):
    """The base that the gates are used with has the statistics it came with."""

    def trained(model):
        folder = adapter_for(model, tmp_path / "a")
        train_gates(model, folder, data(), **quiet(lr=0.05))
        return read_gates(folder)["sigmoid-gate"].gates

    model, still = build(kind), build(kind)
    for module in still.moving.modules():
        module.eval()
        module.train = lambda mode=True: None
    expected = trained(still)
    for path, gate in trained(model).items():
        assert gate.any() and torch.equal(gate, expected[path])


def test_a_batch_of_one_token_passes_batch_norm(tmp_path):
    model = build("batch norm")
    train_gates(model, adapter_for(model, tmp_path / "a"), data(rows=1, length=1), **quiet())


def test_dropout_of_the_base_stays_on(tmp_path):
    """As in PEFT's training; the loss of one batch differs from step to step although nothing is learned."""
    model = gpt2()
    folder = make_adapter(model, tmp_path / "a")
    untouched = Untouched(model)
    losses = train_gates(model, folder, batches(count=1), **quiet(lr=1e-12)).losses
    untouched.check()
    assert len(set(losses)) == len(losses)


def test_a_loop_of_ones_own_inside_gated_model(tmp_path):
    model = build("batch norm").eval()
    folder = adapter_for(model, tmp_path / "a")
    untouched = Untouched(model)
    with gated_model(model, folder) as gated:
        gated.model.train()
        assert model.last.training and not model.moving.training
        model(**data()[0]).loss.backward()
        gated.save()
    untouched.check()
    assert "train" not in vars(model.moving)


def test_frozen_lets_go_after_an_exception():
    model = build("codebook")
    untouched = Untouched(model)
    with pytest.raises(KeyError), frozen(model) as still:
        model(**data()[0])
        assert still.settle() and not model.moving.training
        assert not still.settle()
        raise KeyError
    untouched.check()
    model.eval()
    assert model.train().moving.training


def test_the_caller_may_move_the_model_inside():
    model = build("batch norm")
    with frozen(model):
        model.double()
    assert model.moving.running_mean.dtype == torch.float64
    assert torch.equal(model.moving.running_mean, torch.zeros(WIDTH, dtype=torch.float64))


def test_buffers_that_are_not_copied():
    """Packed weights and offloaded buffers: no copy is taken, and a hook that brings another object moves nothing."""
    model = nn.Module()
    model.register_buffer("packed", torch.zeros(2**17, dtype=torch.int32))
    model.register_buffer("away", torch.zeros(3, device="meta"))
    model.register_buffer("none", None)
    with frozen(model) as still:
        model.away = torch.zeros(3, device="meta")
        away = model.away
        assert not still.settle() and model.training
        model.none = torch.ones(1)
    assert model.none is None and model.away is away


def test_a_rotary_embedding_that_grows(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=8, rope_parameters=rope, **sizes)
    model = LlamaForCausalLM(config).eval()
    folder = make_adapter(model, tmp_path / "a")
    rotary, untouched = model.model.rotary_emb, Untouched(model)
    train_gates(model, folder, batches(length=20), **quiet())
    untouched.check()
    assert rotary.max_seq_len_cached == 8
