"""What a call leaves behind in memory: nothing, whatever kinds of values it takes and returns."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from op_cases import rand

_ops = torch.ops.moerge
CALLS = 500


class _Heap(ctypes.Structure):
    """struct mallinfo2. smblks: freed pieces put aside that are to be merged with their neighbours"""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")]
    _fields_ += [(name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def _heap() -> _Heap:
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    ask.restype = _Heap
    return ask()


def _bytes_in_use() -> int:
    heap = _heap()
    return heap.uordblks + heap.hblkhd


def _calls():
    """By name: every op, plain, with every optional argument, and with tensors that are copied first."""
    T, D, O, E, R = 2, 8, 4, 3, 2  # noqa: N806, E741
    x, gates, base, weight = rand(T, D), rand(E, D, seed=1), rand(T, O, seed=2), rand(O, D, seed=3)
    bank = rand(E, R, D, seed=4), rand(E, O, R, seed=5)
    chosen = _ops.route(x, gates)
    rows, lora_bias = torch.tensor([1, 0], dtype=torch.int32), rand(E, O, seed=6)
    options = 2, "standardize", False, None, None, None, None, None, "softmax"
    every = 2, "standardize", True, 0.5, rand(2, E, seed=7), rows, torch.ones(2, E, dtype=torch.bool), 0.9, "sigmoid"
    branch = *every, lora_bias, True, _ops.pack_experts(*bank)
    copied = x.t().contiguous().t(), gates.double(), *(t[..., ::2] for t in (rand(E, R, 2 * D), rand(E, O, 2 * R)))
    logits, mixed = rand(2, T, 5), rand(T, 2).softmax(1)
    mean = _ops.mix_log_probs(logits, mixed)
    return {
        "route": lambda: _ops.route(x, gates),
        "route, every option": lambda: _ops.route(x, gates, *every),
        "route, copied": lambda: _ops.route(*copied[:2]),
        "route_backward": lambda: _ops.route_backward(rand(T, 2), *chosen, x, gates, 7, *options),
        "route_backward, every option": lambda: _ops.route_backward(rand(T, 2), *chosen, x, gates, 7, *every),
        "lora_apply": lambda: _ops.lora_apply(base, x, *bank, *chosen),
        "lora_apply, every option": lambda: _ops.lora_apply(base, x, *bank, *chosen, lora_bias, None, True, branch[-1]),
        "lora_apply_": lambda: _ops.lora_apply_(base, x, *bank, *chosen),
        "lora_apply_, by rows": lambda: _ops.lora_apply_(base, x, *bank, *chosen, lora_bias, rows),
        "lora_apply_backward": lambda: _ops.lora_apply_backward(base, x, *bank, *chosen, 31, lora_bias, rows),
        "routed_lora": lambda: _ops.routed_lora(base, x, gates, *bank),
        "routed_lora, every option": lambda: _ops.routed_lora(base, x, gates, *bank, *branch),
        "routed_lora_": lambda: _ops.routed_lora_(base, x, gates, *bank),
        "routed_lora_, every option": lambda: _ops.routed_lora_(base, x, gates, *bank, *branch),
        "routed_lora_, copied": lambda: _ops.routed_lora_(base.t().contiguous().t(), *copied),
        "routed_lora_ways": lambda: _ops.routed_lora_ways(base, x, gates, *bank, *branch),
        "routed_linear": lambda: _ops.routed_linear(x, weight, None, gates, *bank),
        "routed_linear_y": lambda: _ops.routed_linear_y(x, weight, None, gates, *bank),
        "routed_linear, every option": lambda: _ops.routed_linear(x, weight, lora_bias[0], gates, *bank, *branch),
        "pack_experts": lambda: _ops.pack_experts(*bank),
        "mix_log_probs": lambda: _ops.mix_log_probs(logits, mixed),
        "mix_log_probs_backward": lambda: _ops.mix_log_probs_backward(mean, mean, logits, mixed, 3),
        "a call that fails": lambda: pytest.raises(RuntimeError, _ops.route, x, gates, 9),
        "a later call that fails": lambda: pytest.raises(RuntimeError, _ops.routed_lora_, base, x, gates, *bank, 9),
    }


def test_every_op_is_called():
    ops = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moerge::")}
    assert ops == {f"moerge::{name.partition(',')[0]}" for name in _calls() if "fails" not in name}


@pytest.mark.parametrize("name", _calls())
def test_a_call_leaves_no_memory_behind(name):
    """A string that torch hands over and nobody deletes would be 48 bytes a call."""
    call = _calls()[name]
    for _ in range(CALLS):
        call()
    for _ in range(3):  # another thread, or a cache that doubles, may be seen in one of them
        gc.collect()
        before = _bytes_in_use()
        for _ in range(CALLS):
            call()
        gc.collect()
        grown = (_bytes_in_use() - before) / CALLS
        if grown < 24:
            return
    pytest.fail(f"{grown:.0f} bytes per call")


def test_a_call_of_one_token_frees_few_pieces_at_once():
    """Beyond the seven of a size that glibc keeps at hand, the next large allocation merges them, which costs."""
    x, gates, base = rand(1, 64), rand(8, 64, seed=1), rand(1, 48, seed=2)
    bank = rand(8, 64, 4, seed=3).mT, rand(8, 4, 48, seed=4).mT
    for _ in range(CALLS):
        _ops.routed_lora_(base, x, gates, *bank)
    aside = []
    for _ in range(5):
        torch.empty(5000)  # merges what there is
        before = _heap().smblks
        _ops.routed_lora_(base, x, gates, *bank)
        aside.append(_heap().smblks - before)
    assert min(aside) <= 8, aside
