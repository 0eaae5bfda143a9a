"""What a call leaves behind in memory: nothing.

Not asked of routed_lora_ways, which is for people: torch keeps the text that an op returns, 80 bytes a call.
"""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from op_cases import rand

_ops = torch.ops.moerge
CALLS = 500


class _Heap(ctypes.Structure):
    _fields_ = [(f"_{i}", ctypes.c_size_t) for i in range(4)]
    _fields_ += [("hblkhd", ctypes.c_size_t), ("_5", ctypes.c_size_t), ("_6", ctypes.c_size_t)]
    _fields_ += [("uordblks", ctypes.c_size_t), ("fordblks", ctypes.c_size_t), ("keepcost", ctypes.c_size_t)]


def _bytes_in_use() -> int:
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    ask.restype = _Heap
    heap = ask()
    return heap.uordblks + heap.hblkhd


def _calls():
    T, D, O, E, R = 2, 8, 4, 3, 2  # noqa: N806, E741
    x, gates, base, weight = rand(T, D), rand(E, D, seed=1), rand(T, O, seed=2), rand(O, D, seed=3)
    bank = gates, rand(E, R, D, seed=4), rand(E, O, R, seed=5)
    chosen = _ops.route(x, gates)
    options = 2, "standardize", False, None, None, None, None, None, "softmax"
    return {
        "route": lambda: _ops.route(x, gates),
        "route_backward": lambda: _ops.route_backward(rand(T, 2), *chosen, x, gates, 7, *options),
        "lora_apply": lambda: _ops.lora_apply(base, x, *bank[1:], *chosen),
        "routed_lora": lambda: _ops.routed_lora(base, x, *bank),
        "routed_lora_": lambda: _ops.routed_lora_(base, x, *bank),
        "routed_linear": lambda: _ops.routed_linear(x, weight, None, *bank),
        "a call that fails": lambda: pytest.raises(RuntimeError, _ops.route, x, gates, 9),
    }


@pytest.mark.parametrize("name", _calls())
def test_a_call_leaves_no_memory_behind(name):
    """A string that torch hands over and nobody deletes would be 48 bytes a call."""
    call = _calls()[name]
    for _ in range(CALLS):
        call()
    grown = []
    for _ in range(3):  # another thread, or a cache that doubles, may be seen in one of them
        gc.collect()
        before = _bytes_in_use()
        for _ in range(CALLS):
            call()
        gc.collect()
        grown.append((_bytes_in_use() - before) / CALLS)
    assert min(grown) < 24, f"{min(grown):.0f} bytes per call"
