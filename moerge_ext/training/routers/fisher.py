"""How near tasks are to each other, by the Fisher information of their experts.

Source: pi-Tuning, arXiv 2304.14381, section 3.

    F = mean over examples of (d loss / d theta)^2          theta: the expert's A and B, at its own data

The order of a LoRA's rank is arbitrary, so the squares are averaged over it: F holds D numbers of A and O of B for
every module, scaled to one unit vector. Two tasks are as similar as the cosine of their F.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...experts.bank import ExpertBank
from ...experts.module_bank import kernel_copy
from ...methods.fixed import PREFIX
from ...routing.patch import patch
from ..batches import Batch
from ..loop import batch_loss
from ..random_state import seeded
from .place import FACTORS, layers_of


def fisher_diagonal(
    model: nn.Module, experts: ExpertBank, name: str, examples: Iterable[Batch], *, progress: bool = True
) -> Tensor:
    """F of the expert `name` [n] float64, of unit length, from batches of one example each (of more, the squares are of
    their mean gradient). The model runs in `.eval()` mode and is as before afterwards.

    ValueError for no examples, and for gradients that are all zero or not finite.
    """
    sums: dict[tuple[str, str], Tensor] = {}
    flags, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    with patch(model, experts, PREFIX + name) as handle, ExitStack() as stack, seeded(model, 0):
        stack.callback(model.train, training)
        for p, flag in flags:
            stack.callback(p.requires_grad_, flag)
            p.requires_grad_(False)
        model.eval()
        leaves = {}
        for path, layer in layers_of(handle).items():
            for factor in FACTORS:
                # a copy: what is differentiated must not be the bank's
                setattr(layer, factor, kernel_copy(getattr(layer, factor)).requires_grad_(True))
                leaves[path, factor] = getattr(layer, factor)
        count = 0
        for batch in tqdm(examples, desc=f"Fisher of {name}", unit="batch", disable=not progress):
            with torch.enable_grad():
                batch_loss(model, batch).backward()
            count += 1
            for key, leaf in leaves.items():
                if leaf.grad is not None:
                    square = leaf.grad.double().square().mean(1 if key[1] == "lora_A" else 2).flatten()
                    sums[key] = sums[key] + square if key in sums else square
                    leaf.grad = None
    if not count:
        raise ValueError(f"expert '{name}': there are no examples to take its Fisher information from")
    whole = [
        sums.get(key, torch.zeros(leaf.shape[2 if key[1] == "lora_A" else 1], dtype=torch.float32, device="cpu"))
        for key, leaf in leaves.items()
    ]
    vector = torch.cat([part.double().cpu() for part in whole])
    if not vector.isfinite().all() or not vector.any():
        raise ValueError(f"expert '{name}': its gradients on these examples are all zero or not finite")
    return vector / vector.norm()


def nearest_experts(fishers: Mapping[str, Tensor], target: str, count: int) -> list[str]:
    """`target` and the `count` experts whose Fisher vectors are most similar to its, in the order of the mapping."""
    own = fishers[target]
    others = sorted((name for name in fishers if name != target), key=lambda n: -float(fishers[n] @ own))
    return [name for name in fishers if name == target or name in others[:count]]
