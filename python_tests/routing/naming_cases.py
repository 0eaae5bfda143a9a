"""Tiny models whose modules were renamed between versions of transformers, and the names their old adapters have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import builders
import torch
import transformers
from torch import Tensor, nn

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
VISION |= {"hidden_size": 32, "intermediate_size": 48}  # as the text's, so that sizes tell nothing


def vit() -> nn.Module:
    return builders._build(transformers.ViTForImageClassification, transformers.ViTConfig(**VISION))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**VISION)
    )
    return builders._build(transformers.LlavaForConditionalGeneration, config)


def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4)
    return builders._build(transformers.Gemma3ForConditionalGeneration, config)


def qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    config = transformers.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    return builders._build(transformers.Qwen2VLForConditionalGeneration, config)


def gemma3n() -> nn.Module:
    """Its layers 2 and 3 share keys and values with those before and have no k_proj and v_proj."""
    layers = {
        "num_hidden_layers": 4,
        "intermediate_size": [48] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
    }
    small = {
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    }
    config = transformers.Gemma3nTextConfig(**{**TEXT, **layers, **small}, head_dim=8)
    return builders._build(transformers.Gemma3nForCausalLM, config)


def old_vit(path: str) -> str:
    """As transformers 4 has it."""
    path = path.replace("vit.layers", "vit.encoder.layer").replace("attention.o_proj", "attention.output.dense")
    names = {"q": "query", "k": "key", "v": "value"}
    path = re.sub(r"attention\.([qkv])_proj", lambda match: f"attention.attention.{names[match[1]]}", path)
    return path.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


def old_llava(path: str) -> str:
    """As transformers before 4.52 has it."""
    path = path.replace("model.language_model", "language_model.model")
    path = re.sub(r"model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", path)
    return path.replace("model.multi_modal", "multi_modal")


def old_qwen(path: str) -> str:
    """As transformers before 4.52 has it."""
    return path.replace("model.language_model", "model").replace("model.visual", "visual")


RENAMED = {
    "vit": (vit, old_vit),
    "llava": (llava, old_llava),
    "gemma3": (gemma3, old_llava),
    "qwen2_vl": (qwen2_vl, old_qwen),
}


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Of one forward, text alone where the model can."""
    random = torch.Generator().manual_seed(1)
    if isinstance(model, transformers.ViTForImageClassification):
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random)}
    return {"input_ids": torch.randint(3, 90, (2, 7), generator=random)}


def linear_layers(model: nn.Module, part: str = "") -> dict[str, tuple[int, int]]:
    """{path: (D, O)} of the nn.Linear whose path contains `part`; an nn.MultiheadAttention never calls its own."""
    return {
        path: (layer.in_features, layer.out_features)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and part in path and not path.endswith("head.attention.out_proj")
    }


def adapter(
    folder: Path, layers: dict[str, tuple[int, int]], name: Callable[[str], str] = str, seed: int = 0, **config
) -> Path:
    """Random LoRA on `layers`, whose paths it calls `name(path)`."""
    random = torch.Generator().manual_seed(seed)
    modules = {
        name(path): (torch.randn(4, d, generator=random) / math.sqrt(d), torch.randn(o, 4, generator=random) / 2)
        for path, (d, o) in layers.items()
    }
    leaves = sorted({path.rpartition(".")[2] for path in modules})
    return builders.write_adapter(folder, modules, alpha=4, **{"task_type": None, "target_modules": leaves} | config)
