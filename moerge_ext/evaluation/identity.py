"""What stored answers depend on, by content: a path says nothing of what lies there today.

Digests are SHA-256 over names, types, shapes and bytes; a model of 1 GB takes about a second.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..experts.bank import ExpertBank
from ..experts.routers import Routers
from ..methods.fixed import PREFIX

ANSWERS = 3  # one more whenever the same model and settings give other answers than before, or keep more with them


def of_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """One digest of named tensors, in the order of their names; of one without data, its type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in [] if tensor.is_meta else _plain(tensor.detach()):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor of a subclass (quantized weights) is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]
    return [tensor]


def of_text(value: Any) -> str:
    """The digest of what JSON can hold; anything else by its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def of_model(model: nn.Module, tokenizer: Any) -> dict[str, str]:
    """Weights and buffers (those of a patch too), configuration, and how text becomes tokens."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    config = getattr(model, "config", None)
    generation = getattr(model, "generation_config", None)
    said = [part.to_dict() for part in (config, generation) if hasattr(part, "to_dict")]
    for part in said:
        part.pop("_name_or_path", None)  # where it came from
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else sorted(tokenizer.get_vocab().items())
    return {
        "weights": of_tensors(tensors),
        "config": of_text(said),
        "tokenizer": of_text([rules, str(tokenizer.special_tokens_map), getattr(tokenizer, "chat_template", None)]),
        "code": f"{__version__}/{ANSWERS}",
    }


def of_experts(bank: ExpertBank, names: Iterable[str]) -> dict[str, str]:
    """{expert: digest of its LoRA, gates and global vectors}, whatever other experts the bank holds."""
    found = {}
    for name in sorted(names):
        e = bank.names.index(name)
        tensors: list[tuple[str, Tensor]] = []
        for path, module in bank.modules.items():
            if not module.present[e]:
                continue
            rank = module.ranks[e]
            tensors += [(f"{path} A", module.lora_A[e, :rank]), (f"{path} B", module.lora_B[e, :, :rank])]
            tensors += [] if module.lora_bias is None else [(f"{path} bias", module.lora_bias[e])]
            tensors += [(f"{path} {kind}", gates[e]) for kind, gates in module.gates.items()]
            own = [branch for branch in module.branches.values() if branch.present[e]]
            tensors += [(f"{path} {b.kind} {part}", rows[e]) for b in own for part, rows in b.tensors.items()]
        tensors += [(f"__global__ {kind}", by[name]) for kind, by in bank.global_vectors.items() if name in by]
        found[name] = of_tensors(tensors)
    return found


def used_experts(method: str | None, bank: ExpertBank) -> tuple[str, ...]:
    """The experts that a run depends on: none for the base, one for `expert:<name>`, else all."""
    if method is None:
        return ()
    return (method[len(PREFIX) :],) if method.startswith(PREFIX) else bank.names


def of_trained(routers: Routers) -> str:
    """What trained routers compute with."""
    tensors = [(f"{path}/{name}", t) for path, named in routers.tensors.items() for name, t in named.items()]
    return of_text([routers.method, routers.names, routers.options, of_tensors(tensors)])


def of_router(router: Any) -> str:
    """What a router compares queries with: its tensors, and its texts."""
    tensors, texts = [], {}
    for name, value in sorted(vars(router).items()):
        if isinstance(value, Tensor):
            tensors.append((name, value))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
            tensors += [(f"{name} {i}", v) for i, v in enumerate(value)]
        elif isinstance(value, (str, int, float, list, tuple, dict)):
            texts[name] = value
    return of_text([of_tensors(tensors), {k: v for k, v in texts.items() if not k.startswith("_")}])
