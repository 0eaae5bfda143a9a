"""Builds the models of the suite `model`: random weights, every linear layer of the blocks with experts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import moerge_ext
from moerge_ext import ExpertBank, ModuleBank

from .real_model import real_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model and its experts; `tokens` is the prompt."""

    hidden: int
    inner: int
    layers: int
    heads: int
    vocabulary: int
    tokens: int
    experts: int = 36
    rank: int = 16
    top_k: int = 2
    kv_heads: int | None = None  # None: as many as heads

    @property
    def modules(self) -> int:
        """Patched layers."""
        return self.layers * len(TARGETS)

    @property
    def parameters(self) -> int:
        attention = 2 * self.hidden**2 * (1 + (self.kv_heads or self.heads) / self.heads)
        return int(self.layers * (attention + 3 * self.hidden * self.inner)) + self.vocabulary * self.hidden

    def facts(self) -> dict[str, Any]:
        """The fields of a row."""
        return {
            "D": self.hidden,
            "O": self.inner,
            "E": self.experts,
            "K": self.top_k,
            "R": self.rank,
            "T": self.tokens,
            "layers": self.layers,
            "modules": self.modules,
            "parameters": self.parameters,
        }


SIZES = {
    "tiny": Size(32, 64, 2, 2, 64, tokens=9, experts=4, rank=2),
    "quick": Size(1024, 2816, 6, 16, 8192, tokens=512),
    "full": Size(1024, 2816, 26, 16, 32000, tokens=512),
    "real": Size(576, 1536, 30, 9, 49152, tokens=512, experts=8, kv_heads=3),
}


def base_model(name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of a size: of random weights, or for "real" that of real_model.py."""
    return real_model(dtype, device) if name == "real" else llama(SIZES[name], dtype, device)


def llama(size: Size, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A LlamaForCausalLM with random weights, in eval mode, without gradients."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads or size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2 * size.tokens + 16,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def make_bank(model: nn.Module, size: Size, dtype: torch.dtype, device: torch.device) -> ExpertBank:
    """Random experts with gates; their branch is about a tenth of the layer's own output."""
    make = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=make, device=device, dtype=kind).mul_(scale)

    modules = {}
    for path, layer in model.named_modules():
        if path.rpartition(".")[2] in TARGETS:
            d, o = layer.in_features, layer.out_features
            a = normal(size.experts, size.rank, d, scale=d**-0.5)
            bt = normal(size.experts, size.rank, o, scale=0.002)
            gates = normal(size.experts, d, scale=1.0, kind=torch.float32)
            modules[path] = ModuleBank(a, bt.transpose(1, 2), gates={"sigmoid-gate": gates})
    return ExpertBank([f"e{i}" for i in range(size.experts)], modules)


def sharing_copy(model: nn.Module) -> nn.Module:
    """Another module tree over the same parameters and buffers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def patched_model(model: nn.Module, bank: ExpertBank, method: str, **options: Any) -> nn.Module:
    """A patched copy that shares the weights of `model`."""
    patched = sharing_copy(model)
    moerge_ext.patch(patched, bank, method, **options)
    return patched


def arrow_model(model: nn.Module, bank: ExpertBank, size: Size) -> nn.Module:
    """PEFT's Arrow over the same experts and weights."""
    from .peft_peers import add_adapters, add_arrow

    factors = {}
    for path, module in bank.modules.items():
        b = module.lora_B.contiguous()  # as PEFT stores it
        factors[path] = [(module.lora_A[e], b[e]) for e in range(size.experts)]
    targets = rf".*\.({'|'.join(TARGETS)})"
    wrapped = add_adapters(sharing_copy(model), targets, size.rank, factors)
    add_arrow(wrapped, targets, size.rank, size.experts, size.top_k)
    return wrapped


def one_adapter_model(model: nn.Module, bank: ExpertBank, size: Size) -> nn.Module:
    """PEFT with the first expert alone, fixed."""
    from .peft_peers import add_adapters

    factors = {path: [(module.lora_A[0], module.lora_B[0].contiguous())] for path, module in bank.modules.items()}
    return add_adapters(sharing_copy(model), rf".*\.({'|'.join(TARGETS)})", size.rank, factors)


def dispatch_layers(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(plain, patched) linear layers of D = O = 8."""
    plain = nn.Linear(8, 8, bias=False, device=device).requires_grad_(False)
    model = nn.Sequential(OrderedDict(proj=plain))
    module = ModuleBank(
        torch.randn(8, 2, 8, device=device),
        torch.randn(8, 2, 8, device=device).transpose(1, 2),
        gates={"sigmoid-gate": torch.randn(8, 8, device=device)},
    )
    moerge_ext.patch(model, ExpertBank([f"e{i}" for i in range(8)], {"proj": module}), "phatgoose", top_k=2)
    model(torch.zeros(1, 8, device=device))  # the first forward of a patched model is watched
    return plain, model.proj
