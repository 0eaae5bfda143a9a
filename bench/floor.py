"""The floor: how fast the branch of a cell could be at all on this machine."""

from __future__ import annotations

from .cells import Cell


def branch_work(cell: Cell, experts_used: int) -> tuple[float, float]:
    """(bytes, FLOPs) that the branch of one call cannot avoid.

    Bytes: A and B of the experts that some token selected, the gates (float32) when it routes, x read once, y read
    and written once. FLOPs: shrink and expand of K experts per token, and the scores of all E when it routes.
    """
    size = cell.torch_dtype.itemsize
    experts = experts_used * cell.R * (cell.D + cell.O) * size
    gates = 4 * cell.E * cell.D
    x, y = cell.T * cell.D * size, 2 * cell.T * cell.O * size
    lora_flops = 2 * cell.T * cell.K * cell.R * (cell.D + cell.O)
    score_flops = 2 * cell.T * cell.E * cell.D
    if cell.mode == "route":
        return gates + x, score_flops
    if cell.mode == "routed":
        return experts + gates + x + y, lora_flops + score_flops
    return experts + x + y, lora_flops


def floor(cell: Cell, experts_used: int, ability: dict[str, float]) -> dict[str, float | str]:
    """Microseconds, and which of the two bounds.

    The rate is the best of the cell's dtype and float32: where bfloat16 is emulated a kernel may compute in float32.
    """
    moved, flops = branch_work(cell, experts_used)
    memory = moved / (ability["bandwidth"] * 1e9) * 1e6
    compute = flops / (max(ability["float32"], ability.get(cell.dtype, 0.0)) * 1e9) * 1e6
    return {
        "floor_us": float(f"{max(memory, compute):.4g}"),
        "floor_bound": "memory" if memory >= compute else "compute",
    }
