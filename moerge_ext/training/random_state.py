"""Random numbers that depend on a seed alone, and generators that the caller finds as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers inside depend on `seed` alone; the caller's generators are left as they were.

    Those of torch (dropout, layers that are skipped), numpy (the masks that speech models put over their spectra)
    and Python.
    """
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    python, numbers = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(random.getrandbits(32))
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(numbers)
