"""Adapters of any format that can be read, written as a PEFT folder."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files.atomic import check_new_folder, write_atomically
from .formats import inspect_adapter
from .formats.adapter import Adapter, AdapterHeader, LoraWeights
from .formats.bottleneck import WEIGHTS_FILE as BOTTLENECK_FILE
from .formats.peft import CONFIG_FILE, WEIGHTS_FILE, into_memory
from .hub import find_adapter
from .keys import PREFIX

KEYS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}
SIDECARS = ("moerge_gates*.safetensors", "moerge_examples*.safetensors")


def convert_adapter(
    source: str | os.PathLike, output: str | os.PathLike, *, base: Any = None, allow_pickle: bool = False
) -> Path:
    """Write the adapter `source` as a PEFT folder `output`; returns it.

    source: a folder, GGUF file or hub id of any format that `load_experts` reads; with `allow_pickle` also a folder
    whose weights are `adapter_model.bin` or `pytorch_adapter.bin`. Bottleneck adapters stay in the layout of the
    library `adapters`. output: a folder that is empty or not there yet. base: see `load_experts`.
    Tensors keep their dtype (8-bit floats become bfloat16); gates and examples beside the adapter come along.

    Raises ValueError (AdapterError with every problem) before anything is written.
    """
    name, path = find_adapter(source)
    target = check_new_folder(output)
    header = inspect_adapter(name, path, base, allow_pickle=allow_pickle)
    adapter = into_memory(header)
    tensors = _tensors(adapter, header) | _saved(header)
    target.mkdir(parents=True, exist_ok=True)
    weights_file = BOTTLENECK_FILE if "peft_type" not in adapter.config else WEIGHTS_FILE
    write_atomically(target / weights_file, lambda file: save_file(tensors, file, {"format": "pt"}))
    for pattern in SIDECARS if header.folder is not None else ():
        for sidecar in header.folder.glob(pattern):
            shutil.copyfile(sidecar, target / sidecar.name)
    # the config last: without it the folder is not yet an adapter
    text = json.dumps(adapter.config, indent=2) + "\n"
    write_atomically(target / CONFIG_FILE, lambda file: file.write_text(text))
    return target


def _saved(header: AdapterHeader) -> dict[str, Tensor]:
    """Parameters of the base that were saved beside the LoRA, under their own keys; tied ones apart."""
    with header.open() as tensors:
        read = {saved.key: tensors.read(saved.key) for saved in header.claims.saved.values()}
        return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in read.items()}


def _tensors(adapter: Adapter, header: AdapterHeader) -> dict[str, Tensor]:
    """The LoRA under PEFT's names, that of a stacked parameter (`target_parameters`) whole, as its file has it; what is
    no LoRA as it is stored."""
    tensors = {}
    with header.open() as stored:
        for path, lora in adapter.modules.items():
            if not isinstance(lora, LoraWeights):
                tensors |= {key: stored.read(key).contiguous() for key in header.keys[path].values()}
                continue
            parts = {"A": lora.lora_A, "B": lora.lora_B, "bias": lora.bias}
            piece = header.modules[path].slice
            if piece is not None:
                path, parts = piece.stored, {part: stored.read(key) for part, key in header.keys[path].items()}
            named = {f"{PREFIX}{path}.{KEYS[part]}": tensor for part, tensor in parts.items() if tensor is not None}
            tensors |= {key: tensor.contiguous() for key, tensor in named.items() if key not in tensors}
    return tensors
