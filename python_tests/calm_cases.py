"""Two tiny decoders with one tokenizer, and their composition."""

from __future__ import annotations

import torch
import transformers
from builders import _DECODER, _build, make_tokenizer

import moerge_ext as moerge


def anchor_and_augmenting(folder):
    """(anchor, augmenting, {role: folder}): a Llama of 4 layers, D=32, a Mistral of 3, D=48 and a window of 8."""
    anchor = _build(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_DECODER | {"num_hidden_layers": 4}))
    other = _DECODER | {"hidden_size": 48, "num_hidden_layers": 3, "sliding_window": 8}
    augmenting = _build(transformers.MistralForCausalLM, transformers.MistralConfig(**other))
    paths = {"anchor": folder / "anchor", "augmenting": folder / "augmenting"}
    for model, path in zip((anchor, augmenting), paths.values(), strict=True):
        model.generation_config.eos_token_id = None  # answers of full length
        model.save_pretrained(path)
        make_tokenizer(path)
    return anchor, augmenting, paths


def composition(paths, trained: bool = True, **options):
    """Composed at two places; `trained`: with numbers in `o_proj`."""
    made = moerge.compose_models(*paths.values(), **{"connections": 2, "heads": 4} | options)
    random = torch.Generator().manual_seed(3)
    for cross in made.cross if trained else ():
        cross.o_proj.weight.data.copy_(0.3 * torch.randn(32, 32, generator=random))
    return made


def batch() -> dict:
    """2 sequences of 12 tokens, the first padded on the left by 3."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
