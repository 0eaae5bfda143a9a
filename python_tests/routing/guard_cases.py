"""Experts on chosen layers of any model, and tiny models whose parents do not simply call their layers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import transformers
from torch import Tensor, nn

import moerge_ext as moerge
from moerge_ext.routing.products import layer_features

NAMES = ("ant", "bee", "cat")
DECODER = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip


def linears(model: nn.Module, *without: str) -> list[str]:
    """The paths of all nn.Linear and subclasses, those that contain one of `without` left out."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(text in path for text in without)
    ]


def experts(model: nn.Module, paths: Iterable[str]) -> moerge.ExpertBank:
    """Random experts with gates on the layers at `paths`."""
    random, modules = torch.Generator().manual_seed(0), {}
    for path in paths:
        layer = model.get_submodule(path)
        d, o = layer_features(layer)
        modules[path] = moerge.ModuleBank(
            torch.randn(len(NAMES), 2, d, generator=random) / d**0.5,
            torch.randn(len(NAMES), o, 2, generator=random),
            gates={"sigmoid-gate": torch.randn(len(NAMES), d, generator=random)},
        )
    return moerge.ExpertBank(NAMES, modules)


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def make(kind: str, config: str, **fields) -> nn.Module:
    """A tiny random model of transformers, by the names of its classes."""
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**fields)).float().eval()


def llava() -> nn.Module:
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = {"model_type": "llama", **DECODER}
    return make(
        "LlavaForConditionalGeneration", "LlavaConfig", text_config=text, vision_config=vision, image_token_index=95
    )


def switch(experts: int = 8) -> nn.Module:
    return make(
        "SwitchTransformersModel", "SwitchTransformersConfig", vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2,
        num_decoder_layers=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, num_heads=4,
        num_experts=experts,
    )  # fmt: skip


def mamba(kind: str = "Mamba") -> nn.Module:
    return make(f"{kind}ForCausalLM", f"{kind}Config", vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)


def llama4() -> nn.Module:
    return make(
        "Llama4ForCausalLM", "Llama4TextConfig", **DECODER, num_key_value_heads=2, intermediate_size_mlp=48, head_dim=8,
        num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=64,
    )  # fmt: skip


def wavlm() -> nn.Module:
    return make(
        "WavLMModel", "WavLMConfig", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip


class Encoder(nn.Module):
    """torch's own encoder layers."""

    def __init__(self, **options):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, **options), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def by_weight(layer: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias)


class Block(nn.Module):
    """`up` is called, `down` handed to a function that reads its weight, `side` called when asked for."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.side = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, side: bool = False) -> Tensor:
        y = by_weight(self.down, self.up(x))
        return self.side(y) if side else y


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.other = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
