"""A mixture of tiny models, and data for it."""

from __future__ import annotations

import copy

import torch
from builders import tiny_llama

import moerge_ext as moerge


def mixture(folder, count: int = 3):
    """A Mixtral of `count` tiny Llamas that went apart, loaded from `folder`/mix."""
    import transformers

    seed, random = tiny_llama(), torch.Generator().manual_seed(1)
    paths = [folder / name for name in "abcd"[:count]]
    for path in paths:
        model = copy.deepcopy(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=random))
        model.save_pretrained(path)
    moerge.mix_models(paths, folder / "mix", progress=False)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "mix").eval()


def batches(count: int = 3) -> list[dict]:
    """Batches of 2 sequences of 12 tokens, the last of the first padded."""
    random = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        ids = torch.randint(3, 90, (2, 12), generator=random)
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made
