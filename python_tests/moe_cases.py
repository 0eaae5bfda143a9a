"""Tiny mixture-of-experts models, adapters on their experts in both layouts, and what such an adapter means."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from builders import write_adapter
from torch import Tensor, nn

from moerge_ext.experts.formats.peft import write_gates

D, I, N, LAYERS = 32, 24, 4, 2  # hidden and intermediate size, base experts, layers
_COMMON = {
    "vocab_size": 96,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPARSE = {"intermediate_size": 48, "moe_intermediate_size": I, "num_experts": N, "num_experts_per_tok": 2}
_LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 0, "n_routed_experts": N, "num_key_value_heads": 4,
}  # fmt: skip
_HYBRID = {
    "hybrid_override_pattern": "*E", "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "head_dim": 8,
    "n_routed_experts": N, "moe_shared_expert_intermediate_size": 16,
}  # fmt: skip
_LOCAL = {"intermediate_size": I, "num_local_experts": N, "num_experts_per_tok": 2}
# name: (model, config, {of a config}); qwen3_moe's experts are the usual ones
MODELS = {
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _SPARSE | {"head_dim": 8}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _SPARSE | {"shared_expert_intermediate_size": 16}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _LOCAL),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"intermediate_size": 16, "num_experts": N, "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _SPARSE | _LATENT),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _LOCAL | {"head_dim": 8}),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig", _SPARSE | _HYBRID),
}
# how transformers 4 named the linear layers of one base expert: (of gate_up_proj's halves or up_proj, of down_proj)
LEAVES = {"mixtral": (("w1", "w3"), "w2"), "nemotron_h": (("up_proj",), "down_proj")}
USUAL = (("gate_proj", "up_proj"), "down_proj")


def build(name: str, seed: int = 0) -> nn.Module:
    """The model, in eval mode."""
    model, config, fields = MODELS[name]
    if not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = getattr(transformers, model)(getattr(transformers, config)(**_COMMON | fields))
    return built.float().eval()


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the fused experts."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "is_transposed")}


def parameters(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj", "down_proj")


def sizes(module: nn.Module, parameter: str) -> tuple[int, int]:
    """(in features, out features)."""
    _, first, second = getattr(module, parameter).shape
    return (first, second) if module.is_transposed else (second, first)


def adapter(
    name: str, model: nn.Module, folder: Path, seed: int, *, layout: str, rank: int = 3, linear: str = "", **config
) -> dict[str, Tensor]:
    """Writes an adapter on all experts (and linears that end with `linear`); returns what it adds: {path: [n,O,D]}.

    layout: "apart", a LoRA for each linear layer of transformers 4, or "whole", PEFT's target_parameters.
    """
    random = torch.Generator().manual_seed(seed)
    alpha = 2.0 * rank
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    made: dict[str, tuple[Tensor, Tensor]] = {}
    deltas = {}

    def lora(width: int, out: int) -> tuple[Tensor, Tensor]:
        return (
            torch.randn(rank, width, generator=random) / math.sqrt(width),
            torch.randn(out, rank, generator=random) / math.sqrt(rank),
        )

    for path, module in expert_modules(model).items():
        for parameter in parameters(module):
            width, out = sizes(module, parameter)
            names = ("",) if layout == "whole" else _names(name, parameter)
            pairs = [[lora(width, out // len(names)) for _ in names] for _ in range(N)]
            deltas[f"{path}.{parameter}"] = torch.stack(
                [torch.cat([b @ a for a, b in pair]) * scaling for pair in pairs]
            )
            if layout == "whole":
                stored = path + ".base_layer" * (parameter != "down_proj")
                a = torch.cat([a for ((a, _),) in pairs])
                made[stored] = a, torch.stack([b for ((_, b),) in pairs], 2).flatten(1)
            else:
                theirs = path.replace(".mlp.", ".block_sparse_moe.") if name == "mixtral" else path
                made |= {f"{theirs}.{j}.{n}": ab for j in range(N) for n, ab in zip(names, pairs[j], strict=True)}
    for path, module in model.named_modules():
        if linear and path.endswith(linear):
            made[path] = lora(module.in_features, module.out_features)
            deltas[path] = made[path][1] @ made[path][0] * scaling
    if layout == "whole":
        config |= {"target_parameters": [path for path in deltas if "experts" in path], "target_modules": [linear]}
    write_adapter(folder, made, r=rank, alpha=alpha, **config)
    return deltas


def _names(name: str, parameter: str) -> tuple[str, ...]:
    first, down = LEAVES.get(name, USUAL)
    return (down,) if parameter == "down_proj" else first


def gates(model: nn.Module, folder: Path, seed: int, kind: str = "sigmoid-gate") -> dict[str, Tensor]:
    """Writes a random gate for each stacked parameter; returns them."""
    random = torch.Generator().manual_seed(100 + seed)
    made = {
        f"{path}.{parameter}": torch.randn(sizes(module, parameter)[0], generator=random)
        for path, module in expert_modules(model).items()
        for parameter in parameters(module)
    }
    write_gates(folder, made, kind=kind)
    return made


def changed(name: str, deltas: dict[str, Tensor], weight: float = 1.0, model: nn.Module | None = None) -> nn.Module:
    """The model (default: a new one) with `weight * deltas` in its weights."""
    model = build(name) if model is None else model
    with torch.no_grad():
        for path, delta in deltas.items():
            owner, _, leaf = path.rpartition(".")
            if delta.dim() == 2:
                model.get_submodule(path).weight += weight * delta
            else:
                module = model.get_submodule(owner)
                getattr(module, leaf).add_(weight * (delta.mT if module.is_transposed else delta))
    return model


class AnyConfig:
    """A config that has whatever an experts module asks for."""

    hidden_size, intermediate_size, moe_intermediate_size = D, I, I
    num_experts = num_local_experts = n_routed_experts = moe_num_experts = N
    hidden_act = hidden_activation = "silu"
    mlp_hidden_act = "relu2"
    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> float | None:
        if name.startswith("__"):
            raise AttributeError(name)
        guesses = {"hidden": D, "intermediate": I, "limit": 0.5, "alpha": 0.5, "cap": 0.5, "eps": 1e-5}
        return next((value for part, value in guesses.items() if part in name), None)


def experts_classes() -> Iterator[type]:
    """Every class of transformers' models that its experts interface computes."""
    folder = Path(transformers.__file__).parent / "models"
    for file in sorted(folder.glob("*/modeling_*.py")):
        names = re.findall(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", file.read_text(), re.MULTILINE)
        for name in names:
            yield getattr(importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}"), name)


def experts_of(kind: type) -> nn.Module:
    """One such module with random weights."""
    module = kind(AnyConfig()).float().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module
