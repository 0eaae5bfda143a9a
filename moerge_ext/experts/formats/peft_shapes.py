"""What is wrong with the sizes and types of one module's tensors."""

from __future__ import annotations

from collections.abc import Mapping

from ...files.safefile import FLOATS, TensorHeader

_WANTED = {
    "A": ("lora_A", 2, "[R, D]"),
    "B": ("lora_B", 2, "[O, R]"),
    "bias": ("lora_B.bias", 1, "[O]"),
}


_UNGATHERED = " (DeepSpeed ZeRO-3 or FSDP, saved without gathering the parameters? Save it again with them gathered)"


def shape_problems(found: Mapping[str, TensorHeader]) -> list[str]:
    problems = []
    for part, label in (("A", "lora_A"), ("B", "lora_B")):
        if part not in found:
            problems.append(f"{label}.weight is missing")
    for part, header in found.items():
        label, dims, want = _WANTED[part]
        if header.dtype not in FLOATS:
            problems.append(f"{label} must be one of {', '.join(FLOATS)}, got {header.dtype}")
        if len(header.shape) != dims:
            hint = _UNGATHERED if len(header.shape) < dims else ""
            if len(header.shape) > 2:
                hint = (
                    " (LoRA of a convolution or of an old fused layout; load_experts(..., modules=...) leaves it out)"
                )
            problems.append(f"{label} must be {want}, got {list(header.shape)}{hint}")
        elif 0 in header.shape:
            problems.append(f"{label} has no elements, shape {list(header.shape)}{_UNGATHERED}")
    if problems:
        return problems
    lora_a, lora_b = found["A"].shape, found["B"].shape
    if lora_a[0] != lora_b[1]:
        problems.append(f"ranks disagree, lora_A {list(lora_a)} [R, D] and lora_B {list(lora_b)} [O, R]")
    if "bias" in found and found["bias"].shape[0] != lora_b[0]:
        problems.append(f"lora_B.bias must be [O={lora_b[0]}], got {list(found['bias'].shape)}")
    return problems
