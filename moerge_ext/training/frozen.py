"""A frozen model that stays as it was while something beside it is trained.

In `.train()` mode a forward does more than let gradients pass: batch normalization moves its running statistics,
spectral normalization its vectors, a codebook its moving average. The base that an expert is used with later is in
`.eval()` mode and has the statistics it came with, so that is the base to train for. Dropout, which changes nothing
that lasts, stays on in the base, as it is in PEFT's and transformers' training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .quantized import passing_gradients

_OF_TORCH = frozenset(vars(nn.Module()))  # an nn.Module's own attributes
_PACKED = 2**16  # integers beyond this many are a quantizer's packed weights, which no forward writes


class Frozen:
    """The buffers of a model's modules as they are, and which modules are held in `.eval()` mode.

    Made before anything is wrapped into the model, so that what is trained is not among them. Beside each buffer the
    plain attributes of its module are kept: a rotary embedding that grows with the text notes its length there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [_Kept(module) for module in model.modules() if module._buffers]
        self._held: list[_Kept] = []
        for kept in self._kept:
            if isinstance(kept.module._buffers.get("running_mean"), Tensor):
                # at once: a batch of one value per channel is an error in training mode
                self._hold(kept)

    def settle(self) -> bool:
        """Whether the last forward moved modules that were not held still; they are now, and everything is put back.

        What that forward gave is then not what the frozen model gives: it is to be run again. Otherwise nothing is
        put back: backward may read what forward wrote.
        """
        found = [kept for kept in self._kept if kept.module.training and kept.moved()]
        for kept in found:
            self._hold(kept)
        if found:
            self.put_back()
        return bool(found)

    def put_back(self) -> None:
        """Every buffer as it was: what moves also in `.eval()` mode (an observer, a table that grows) as well."""
        for kept in self._kept:
            if kept.moved():
                kept.put_back()

    def release(self) -> None:
        """Ends the hold: the modules obey `train()` again and are in the mode they had."""
        for kept in self._held:
            module = kept.module
            module.__dict__.pop("train", None)  # who wrapped the module may have taken it off
            if kept.train is not None:
                module.__dict__["train"] = kept.train
            module.training = kept.training
        self._held.clear()

    def _hold(self, kept: _Kept) -> None:
        self._held.append(kept)
        kept.module.__dict__["train"] = partial(_train_children, kept.module)
        kept.module.training = False


@contextmanager
def frozen(model: nn.Module) -> Iterator[Frozen]:
    """`model` holds still inside: its buffers are bit-identical afterwards, also after an exception.

    Norms with running statistics are in `.eval()` mode whatever `model.train()` says, and weights are in a form that
    gradients pass.
    """
    state = Frozen(model)
    try:
        with passing_gradients(model):
            yield state
    finally:
        state.release()
        state.put_back()


class _Kept:
    """One module's buffers with their values, and its plain attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.train = vars(module).get("train")  # put there by the module's owner
        self.buffers = {name: (b, b.detach().clone() if _is_kept(b) else None) for name, b in module._buffers.items()}
        self.attributes = {name: value for name, value in vars(module).items() if _is_plain(name, value)}

    def moved(self) -> bool:
        """Whether a buffer is another or has other values."""
        current = self.module._buffers
        return current.keys() != self.buffers.keys() or any(
            _moved(current[name], tensor, values) for name, (tensor, values) in self.buffers.items()
        )

    def put_back(self) -> None:
        """The buffers, with their values, and the attributes as they were."""
        module = self.module
        for name in module._buffers.keys() - self.buffers.keys():
            del module._buffers[name]
        for name, (tensor, values) in self.buffers.items():
            now = module._buffers.get(name)
            if values is None and (now is None) == (tensor is None):
                continue
            # the caller may have moved the model to another device: then the values are put where it is
            target = now if _is_elsewhere(now, tensor) else tensor
            if values is not None and not _equal(target, values):
                with torch.no_grad():
                    target.copy_(values)
            module._buffers[name] = target
        for name in [n for n, v in vars(module).items() if _is_plain(n, v) and n not in self.attributes]:
            del module.__dict__[name]
        module.__dict__.update(self.attributes)


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    """What `train` does on a module that is held: its children obey, it stays in `.eval()` mode."""
    for child in module.children():
        child.train(mode)
    module.training = False
    return module


def _is_kept(buffer: Tensor | None) -> bool:
    """Whether a copy of the buffer is taken."""
    if type(buffer) not in (Tensor, nn.Buffer) or buffer.is_meta or buffer.layout != torch.strided:
        return False
    floats = buffer.is_floating_point() or buffer.is_complex() or buffer.dtype == torch.bool
    return not buffer.is_quantized and (floats or buffer.numel() <= _PACKED)


def _is_plain(name: str, value: Any) -> bool:
    """Whether an attribute of a module is state that a forward may note: a number, a text, a tensor."""
    return name not in _OF_TORCH and (value is None or isinstance(value, (bool, int, float, str, Tensor)))


def _moved(now: Tensor | None, tensor: Tensor | None, values: Tensor | None) -> bool:
    """Whether a buffer changed; of one without a copy (packed, offloaded) only whether it is there."""
    if values is None or now is None:
        return (now is None) != (tensor is None)
    if now is not tensor and not _is_elsewhere(now, tensor):
        return True
    return not _equal(now, values)


def _is_elsewhere(now: Tensor | None, tensor: Tensor | None) -> bool:
    """Whether `now` is `tensor` on another device or in another type."""
    if now is None or tensor is None or now.shape != tensor.shape:
        return False
    return (now.device, now.dtype) != (tensor.device, tensor.dtype)


def _equal(now: Tensor, values: Tensor) -> bool:
    """Whether two tensors of one shape hold the same values, NaN in the same places."""
    values = values.to(now.device, now.dtype)
    if now.dtype.itemsize == 1:
        now, values = now.view(torch.uint8), values.view(torch.uint8)  # float8 has no comparison
    return torch.equal(now, values) or bool(((now == values) | ((now != now) & (values != values))).all())
