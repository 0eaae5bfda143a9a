"""Whether a bank fits into memory. Its stacks are padded to the largest rank of each module, so one expert of rank 256
among a hundred of rank 8 makes the bank 24 times as large as the adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

NOTED_PADDING, NOTED_BYTES = 4, 1 << 30  # the factor and the bytes of padding that are said though they fit
_CGROUP = Path("/sys/fs/cgroup")

Holders = Mapping[str, Sequence[tuple[int, Any]]]  # {module: [(expert id, header)]}


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [_available(), _left_of_limit()]
    return min((size for size in free if size is not None), default=None)


def memory_problem(names: Sequence[str], holders: Holders, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the bank of these experts does not fit on `device`, with the figures and the ways out."""
    needed, free = padded_bytes(len(names), holders, dtype), free_memory(device)
    if free is None or needed <= free:
        return None
    return (
        f"the bank would take {_gib(needed)} on {device}, where {_gib(free)} are free ({needed} and {free} bytes)"
        f"{_blame(names, holders, dtype, needed)}. Ways out: fewer experts (names=[...]) or modules (modules=...), a "
        "bank of its own for an expert of a large rank, dtype=torch.bfloat16, another device"
    )


def padding_note(names: Sequence[str], holders: Holders, dtype: torch.dtype) -> str | None:
    """What to say of a bank that fits and is mostly padding."""
    needed, own = padded_bytes(len(names), holders, dtype), _own_bytes(holders, dtype)
    if needed <= NOTED_PADDING * own or needed - own <= NOTED_BYTES:
        return None
    return f"the bank takes {_gib(needed)}{_blame(names, holders, dtype, needed)}"


def padded_bytes(num: int, holders: Holders, dtype: torch.dtype) -> int:
    """Bytes of the stacks lora_A [E,R,D] and lora_B [E,O,R] of all modules, R the module's largest rank."""
    return sum(
        num * max(header.rank for _, header in held) * _width(held) * dtype.itemsize for held in holders.values()
    )


def _own_bytes(holders: Holders, dtype: torch.dtype) -> int:
    """The same without padding."""
    return sum(header.rank * _width(held) * dtype.itemsize for held in holders.values() for _, header in held)


def _width(held: Sequence[tuple[int, Any]]) -> int:
    return held[0][1].in_features + held[0][1].out_features


def _blame(names: Sequence[str], holders: Holders, dtype: torch.dtype, needed: int) -> str:
    """ ": ..." with the experts of the largest rank and what the bank takes without them; empty where all are alike."""
    ranks = [0] * len(names)
    for held in holders.values():
        for e, header in held:
            ranks[e] = max(ranks[e], header.rank)
    largest = max(ranks)
    who = [e for e, rank in enumerate(ranks) if rank == largest]
    others = {path: [(e, header) for e, header in held if e not in who] for path, held in holders.items()}
    others = {path: held for path, held in others.items() if held}
    if not others:
        return ""
    more = f" and {len(who) - 3} more" if len(who) > 3 else ""
    return (
        f": all {len(names)} experts are padded to the largest rank, {largest} of "
        f"{', '.join(repr(names[e]) for e in who[:3])}{more}, {needed / _own_bytes(holders, dtype):.0f} times what the "
        f"adapters hold; without {'it' if len(who) == 1 else 'them'} it takes "
        f"{_gib(padded_bytes(len(names) - len(who), others, dtype))}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _available() -> int | None:
    """What Linux counts as free or freeable."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _left_of_limit() -> int | None:
    """What a container's limit (cgroup 2, then 1) leaves; its cached files count as free."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            stat = (_CGROUP / Path(limit).parent / "memory.stat").read_text().splitlines()
            cached = next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
            return int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text()) + cached
        except (OSError, ValueError, IndexError):  # not there, or "max"
            continue
    return None
