"""Tiny models, adapters and batches for the tests that train, and a watch over what they must not touch."""

from __future__ import annotations

import copy
import random

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from moerge_ext.training.experts import new_expert

VOCABULARY = 40


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    # dropout stays at its 0.1: resuming must not depend on it
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes))


MODELS = {"llama": llama, "gpt2": gpt2, "t5": t5}


def batches(count=4, rows=2, length=8, seed=1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    return made


def make_adapter(model, folder, scale=0.3):
    """A PEFT folder on every linear of the model, both factors random."""
    new_expert(model, folder, rank=4, alpha=4, overwrite=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(3)
    tensors = {key: torch.randn(t.shape, generator=generator) * scale for key, t in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


class Untouched:
    """Holds everything of a model that a training run must leave alone."""

    def __init__(self, model):
        self.model = model
        self.state = copy.deepcopy(model.state_dict())
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}  # also those outside the state dict
        self.random = generators()
        self.modules = list(model.named_modules())
        self.flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.modes = [m.training for m in model.modules()]
        self.hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        self.attributes = set(vars(model))

    def check(self):
        model, state = self.model, self.model.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(state[key], value) for key, value in self.state.items())
        buffers = dict(model.named_buffers())
        assert list(buffers) == list(self.buffers)
        assert all(torch.equal(buffers[name], value) for name, value in self.buffers.items())
        assert generators() == self.random
        assert list(model.named_modules()) == self.modules
        assert {n: p.requires_grad for n, p in model.named_parameters()} == self.flags
        assert all(p.grad is None for p in model.parameters())
        assert [m.training for m in model.modules()] == self.modes
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == self.hooks
        assert set(vars(model)) == self.attributes


def generators():
    """The state of every generator that a model may draw from."""
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numpy.random.get_state()]


def quiet(**options):
    """Options of a short training, which replaces what an earlier one has made."""
    return {"progress": False, "steps": 6, "overwrite": True, **options}


class Killed(Exception):
    pass


def breaking(data, after):
    """The batches of `data` again and again, and an exception after so many."""

    class Source:
        def __iter__(self):
            for i in range(10_000):
                if i == after:
                    raise Killed
                yield data[i % len(data)]

    return Source()


@pytest.fixture(autouse=True)
def one_thread():
    """Import this where models this small are trained: a second thread costs them more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
