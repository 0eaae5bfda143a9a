"""The ops: what the kernels compute, as functions of tensors.

`wrappers.py` has every op with its docstring, `reference.py` the same in plain torch: the definition of correct,
`options.py` what both may be told. `autograd.py` registers fake kernels and gradients. Start with `reference.py`:
`route` and `lora_apply`.

May import: native.
"""

from .wrappers import (
    ROUTED_LINEAR_Y,
    ROUTED_LORA_,
    call,
    explained,
    has_kernels,
    lora_apply,
    lora_apply_,
    mix_log_probs,
    pack_experts,
    route,
    routed_linear,
    routed_lora,
    routed_lora_,
    routed_lora_ways,
)

__all__ = [
    "ROUTED_LINEAR_Y",
    "ROUTED_LORA_",
    "call",
    "explained",
    "has_kernels",
    "lora_apply",
    "lora_apply_",
    "mix_log_probs",
    "pack_experts",
    "route",
    "routed_linear",
    "routed_lora",
    "routed_lora_",
    "routed_lora_ways",
]
