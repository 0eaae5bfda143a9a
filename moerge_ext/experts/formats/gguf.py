"""LoRA adapters of llama.cpp, as its convert_lora_to_gguf.py writes them: one GGUF file.

    general.architecture = "llama", general.type = "adapter", adapter.type = "lora", adapter.lora.alpha
    blk.0.attn_q.weight.lora_a [R,D], blk.0.attn_q.weight.lora_b [O,R]         scaling alpha / R, or 1 without alpha

llama.cpp keeps q and k of some architectures in another order of rows: it rotates neighbouring pairs of a head where
Hugging Face rotates its halves. Row (pair i, half h) of every head comes before (i, h + 1), so lora_b is brought back
with the number of heads, which only the base model's config knows.
(Facts: llama.cpp, convert_lora_to_gguf.py, conversion/llama.py and src/llama-adapter.h, 2026.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files.gguffile import GgufFile, GgufTensor, map_gguf, read_gguf, read_values
from ...files.safefile import TensorHeader
from ..keys import PREFIX
from .view import AdapterView, one_line_a_cause, peft_config

# llama.cpp's name of a layer's tensor -> where Hugging Face has it, for the models that name their layers as Llama does
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED = {  # Phi-3 keeps q, k and v, and gate and up, in one layer each
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_NO_GATE = {name: path for name, path in _LAYER.items() if name != "ffn_gate"}
_PLAIN_MLP = {name: path for name, path in _LAYER.items() if name.startswith("attn_")} | {
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
# architecture: (names, whether the rows of q and k are reordered)
ARCHITECTURES: dict[str, tuple[Mapping[str, str], bool]] = {
    "llama": (_LAYER, True),  # also Mistral
    "mistral3": (_LAYER, True),
    "granite": (_LAYER, True),
    "smollm3": (_LAYER, True),
    "arcee": (_NO_GATE, True),
    "olmo": (_LAYER, True),
    "olmo2": (_LAYER, False),
    "qwen2": (_LAYER, False),
    "qwen3": (_LAYER, False),
    "gemma": (_LAYER, False),
    "gemma2": (_LAYER, False),
    "gemma3": (_LAYER, False),
    "phi3": (_FUSED, False),
    "starcoder2": (_PLAIN_MLP, False),
}
_NAME = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<part>[ab])")
_BLOCK = re.compile(r"blk\.(?P<layer>0|[1-9]\d{0,5})\.(?P<name>\w+)")
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}


@dataclass(frozen=True)
class Heads:
    """What the base model's config says of its attention."""

    query: int
    key: int
    head_dim: int


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name or its first bytes."""
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as opened:
        return opened.read(4) == b"GGUF"


def view_gguf(path: Path, base: Any = None) -> AdapterView:
    """The adapter in a GGUF file (a resolved path) as PEFT would have it. ValueError for a file that cannot be read.

    base: the base model, its config, or where either lies; needed when rows of q and k are to be put back.
    """
    file = read_gguf(path)
    problems = _kind_problems(file)
    if problems:
        return AdapterView(problems=problems)
    names, reordered = ARCHITECTURES[file.values["general.architecture"]]
    found: dict[str, tuple[str, GgufTensor]] = {}  # PEFT's key: (module's name in llama.cpp, tensor)
    causes: dict[str, list[str]] = {}
    for tensor in file.tensors.values():
        key, why = _peft_key(tensor, names)
        if why:
            causes.setdefault(why, []).append(tensor.name)
        else:
            found[key] = (_NAME.fullmatch(tensor.name)["module"], tensor)
    problems += one_line_a_cause(causes)
    heads = None
    if reordered and any(_is_rotated(module) for module, _ in found.values()):
        try:
            heads = _heads_of(base)
        except ValueError as error:
            problems.append(f"{path.name} {error}")
        else:
            problems += _row_problems(found, heads)
    alpha = file.values.get("adapter.lora.alpha") or None
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_B.weight"): tensor.shape[-1]
        for key, (_, tensor) in found.items()
        if key.endswith(".lora_B.weight")
    }
    config = peft_config(
        ranks,
        {module: alpha if alpha is not None else rank for module, rank in ranks.items()},
        base_model=_base_model(file),
    )
    headers = {key: TensorHeader(tensor.shape, tensor.held_as) for key, (_, tensor) in found.items()}

    @contextmanager
    def open_file() -> Iterator[_OpenGguf]:
        yield _OpenGguf(map_gguf(file), headers, found, heads)

    return AdapterView(config, open_file, problems)


@dataclass(frozen=True)
class _OpenGguf:
    mapped: mmap
    headers: dict[str, TensorHeader]
    found: dict[str, tuple[str, GgufTensor]]
    heads: Heads | None

    def read(self, key: str) -> Tensor:
        module, tensor = self.found[key]
        values = read_values(self.mapped, tensor)
        if self.heads is not None and "lora_B" in key and _is_rotated(module):
            return halves_from_pairs(values, self.heads.key if module.endswith("attn_k") else self.heads.query)
        return values


def halves_from_pairs(rows: Tensor, heads: int) -> Tensor:
    """[O, ...] with the rows of every head as (pair, half), as llama.cpp has them -> as (half, pair)."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _is_rotated(module: str) -> bool:
    return module.endswith((".attn_q", ".attn_k"))


def _kind_problems(file: GgufFile) -> list[str]:
    """Why this is no LoRA adapter of a known architecture."""
    values = file.values
    kind, adapter, architecture = (values.get(key) for key in ("general.type", "adapter.type", "general.architecture"))
    if kind != "adapter":
        return [
            f"{file.path.name} is a GGUF file of type {kind!r}, not an adapter (general.type = 'adapter'): a base "
            "model is loaded by transformers, with gguf_file="
        ]
    problems = []
    if adapter != "lora":
        problems.append(f"{file.path.name}: adapter.type must be 'lora', got {adapter!r}")
    if architecture not in ARCHITECTURES:
        problems.append(
            f"{file.path.name}: an adapter for {architecture!r}; the names and the order of rows are known for "
            f"{', '.join(sorted(ARCHITECTURES))}. Load the PEFT folder that it was converted from"
        )
    if "adapter.alora.invocation_tokens" in values:
        problems.append(f"{file.path.name}: aLoRA switches on at an invocation string")
    alpha = values.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, float):
        problems.append(f"{file.path.name}: adapter.lora.alpha must be a number, got {alpha!r}")
    if not file.tensors:
        problems.append(f"{file.path.name} holds no tensor")
    return problems


def _peft_key(tensor: GgufTensor, names: Mapping[str, str]) -> tuple[str, str | None]:
    """(PEFT's key, why there is none)."""
    match = _NAME.fullmatch(tensor.name)
    if match is None:
        return "", "not a LoRA weight (<layer>.weight.lora_a or .lora_b): it would replace a part of the base model"
    module = match["module"]
    if module == "token_embd":
        return "", "LoRA on an embedding, which is not a linear layer"
    block = _BLOCK.fullmatch(module)
    if module == "output":
        path = "lm_head"
    elif block is not None and block["name"] in names:
        path = f"model.layers.{block['layer']}.{names[block['name']]}"
    elif block is not None and len(tensor.shape) > 2:
        return "", f"{len(tensor.shape)} sizes: LoRA on the experts of a mixture, which are no linear layers"
    else:
        return "", f"there is no layer of that name; known are output and blk.<n>.{{{', '.join(names)}}}"
    return f"{PREFIX}{path}.{_PARTS[match['part']]}", None


def _heads_of(base: Any) -> Heads:
    """The heads that the base model's config names."""
    from .base_config import base_config

    if base is None:
        raise ValueError(
            "keeps q and k in llama.cpp's order of rows, head by head, and does not say how many heads there are: pass "
            "base=, the base model or its folder (of the command: --model)"
        )
    config = base_config(base)
    query = config.get("num_attention_heads")
    key = config.get("num_key_value_heads") or query
    hidden = config.get("hidden_size")
    if not all(isinstance(number, int) and number > 0 for number in (query, key, hidden)):
        raise ValueError(
            f"needs num_attention_heads, num_key_value_heads and hidden_size of the base's config, got {query!r}, "
            f"{key!r}, {hidden!r}"
        )
    return Heads(query, key, config.get("head_dim") or hidden // query)


def _row_problems(found: Mapping[str, tuple[str, GgufTensor]], heads: Heads) -> list[str]:
    """Rows of q and k that are not those of the base."""
    causes: dict[str, list[str]] = {}
    for key, (module, tensor) in found.items():
        if "lora_B" not in key or not _is_rotated(module) or len(tensor.shape) != 2:
            continue
        number = heads.key if module.endswith("attn_k") else heads.query
        if tensor.shape[0] != number * heads.head_dim or heads.head_dim % 2:
            says = f"the base's config says {number} heads of {heads.head_dim}: is it the base of this adapter?"
            causes.setdefault(f"{tensor.shape[0]} rows, {says}", []).append(tensor.name)
    return one_line_a_cause(causes)


def _base_model(file: GgufFile) -> str | None:
    url = file.values.get("general.base_model.0.repo_url")
    return url.removeprefix("https://huggingface.co/") if isinstance(url, str) and url else None
