"""Tiny models of every supported family with random experts, and what the tests of `patch` compare."""

from __future__ import annotations

from pathlib import Path

import builders
import torch
from torch import Tensor, nn

import moerge_ext as moerge

DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": (builders.tiny_llama, DECODER),
    "qwen2": (builders.tiny_qwen2, DECODER),
    "qwen3": (builders.tiny_qwen3, DECODER),
    "mistral": (builders.tiny_mistral, DECODER),
    "gpt2": (builders.tiny_gpt2, ("c_attn", "c_proj", "c_fc")),
    "t5": (builders.tiny_t5, ("q", "k", "v", "o", "wi_0", "wi_1", "wo")),
    "bert": (builders.tiny_bert, ("query", "key", "value", "dense")),
}
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
NAMES = ("ant", "bee", "cat")


def build(family: str) -> nn.Module:
    """The tiny model, in eval mode."""
    return FAMILIES[family][0]()


def bank(family: str, model: nn.Module, folder: Path, names=NAMES, **options) -> moerge.ExpertBank:
    """Random experts with gates on every linear layer of the family."""
    return moerge.load_experts(builders.random_experts(model, folder, names, FAMILIES[family][1], **options))


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(family: str, rows: int = 2, length: int = 7, seed: int = 0, labels: bool = False) -> dict[str, Tensor]:
    """Inputs of the family's forward."""
    ids = tokens(rows, length, seed)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        made["labels" if labels else "decoder_input_ids"] = tokens(rows, 5, seed + 1)
    elif labels:
        made["labels"] = torch.arange(rows) % 3 if family == "bert" else ids
    return made


@torch.no_grad()
def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def snapshot(model: nn.Module) -> dict:
    """Everything `remove` must bring back; compare two with `same`."""
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "hooks": [
            [len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v is not None]
            for module in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "storage": [(name, p.data_ptr()) for name, p in model.named_parameters()],
        "state": {key: value.clone() for key, value in model.state_dict().items()},
    }


def same(before: dict, after: dict) -> bool:
    states = before["state"], after["state"]
    return (
        all(before[key] == after[key] for key in before if key != "state")
        and list(states[0]) == list(states[1])
        and all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    )


def saves_its_own_biases() -> bool:
    """Whether PEFT leaves the biases of the other adapters out of the file of one."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    layer = torch.nn.ModuleDict({"q": torch.nn.Linear(2, 2)})
    model = get_peft_model(layer, LoraConfig(target_modules=["q"]), adapter_name="ant")
    model.add_adapter("bee", LoraConfig(target_modules=["q"], lora_bias=True))
    return not any("bias" in key for key in get_peft_model_state_dict(model, adapter_name="ant"))
