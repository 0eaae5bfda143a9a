"""The parts of a composition of two models (CALM): its cross attention, its cache, and where layers are.

Source: LLM Augmented LLMs: Expanding Capabilities through Composition, arXiv 2401.02412, section 3. H_A [T,D_A] are an
augmenting model's hidden states behind a layer, H_B [T,D_B] the anchor model's:

    H_B <- H_B + concat over heads k of [ softmax(Q_k K_k^T / sqrt(d)) V_k ] W_O
    Q = H_B W_Q,   K = f(H_A) W_K,   V = f(H_A) W_V,   f(H_A) = H_A W_proj [D_A,D_B]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

PARTS = ("proj", "q_proj", "k_proj", "v_proj", "o_proj")


class CrossAttention(nn.Module):
    """One connection. `o_proj` begins at zero: a composition that was not trained is the anchor.

    augmenting, anchor: D_A and D_B; heads divide D_B. Position t attends to the positions up to t: the paper has
    nothing of this that could be read, and a model that predicts the next token may not see it.
    """

    def __init__(self, augmenting: int, anchor: int, heads: int):
        super().__init__()
        if isinstance(heads, bool) or heads < 1 or anchor % heads:
            raise ValueError(f"heads must divide the anchor's width D={anchor}, got {heads}")
        self.heads = heads
        self.proj = nn.Linear(augmenting, anchor, bias=False)
        for name in PARTS[1:]:
            setattr(self, name, nn.Linear(anchor, anchor, bias=False))

    def begin(self, generator: torch.Generator) -> None:
        """Normal numbers with a deviation of 1/sqrt(in features), and zeros in `o_proj`."""
        for name in PARTS:
            weight = getattr(self, name).weight.data
            weight.copy_(
                torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
                / math.sqrt(weight.shape[1])
            )
        self.o_proj.weight.data.zero_()

    def forward(self, anchor: Tensor, augmenting: Tensor, mask: Tensor, cache: Cache | None, index: int) -> Tensor:
        """H_B [N,T,D_B], H_A [N,T,D_A] -> what is added to H_B, in its type.

        mask [N,1,T,T'] bool: which of all T' positions so far each of these T attends to; cache: of the keys and values
        of those before, under `index`. Computed in the type of the weights.
        """
        dtype = self.proj.weight.dtype
        with torch.autocast(anchor.device.type, enabled=False):
            source = self.proj(augmenting.to(dtype))
            q, k, v = (self._split(part) for part in (self.q_proj(anchor.to(dtype)), self.k_proj(source),
                                                      self.v_proj(source)))  # fmt: skip
            if cache is not None:
                k, v = cache.update(k, v, index)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.o_proj(mixed.transpose(1, 2).flatten(2)).to(anchor.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CompositionCache(Cache):
    """The keys and values of both models and of the cross attention between them, which beams reorder as one."""

    def __init__(self, anchor: DynamicCache, augmenting: DynamicCache, connections: int):
        self.anchor, self.augmenting = anchor, augmenting
        self.cross = DynamicCache()
        self.cross.layers = [DynamicLayer() for _ in range(connections)]
        super().__init__(layers=[*anchor.layers, *augmenting.layers, *self.cross.layers])


def seen_positions(length: int, past: int, mask: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """[N,1,T,T'] bool, T' = past + T: position t sees those up to it that are no padding, and itself.

    mask [N,T'], of which 0 is padding. ValueError for another shape.
    """
    total = past + length
    t = torch.arange(past, total, device=device)[:, None]
    other = torch.arange(total, device=device)[None]
    seen = (other <= t)[None, None]
    if mask is None:
        return seen.expand(rows, 1, length, total)
    if mask.shape != (rows, total):
        raise ValueError(f"attention_mask must be [{rows}, {total}], got {list(mask.shape)}")
    return (seen & (mask != 0)[:, None, None]) | (other == t)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of a decoder's layers. ValueError for a model in which it cannot be told."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [(path.count("."), module) for path, module in model.base_model.named_modules()
             if isinstance(module, nn.ModuleList) and len(module) == count]  # fmt: skip
    outer = [module for depth, module in found if depth == min(depth for depth, _ in found)]
    if len(outer) != 1:
        raise ValueError(f"{type(model).__name__} has no single list of {count} layers, at which it could be connected")
    return outer[0]


def evenly(count: int, anchor: int, augmenting: int) -> list[tuple[int, int]]:
    """`count` connections at the ends of as many equal parts of both models: (anchor's layer, augmenting's layer)."""
    if isinstance(count, bool) or not 1 <= count <= min(anchor, augmenting):
        raise ValueError(
            f"connections must be from 1 to {min(anchor, augmenting)} (the models have {anchor} and {augmenting} "
            f"layers), got {count!r}"
        )
    return [tuple((k + 1) * layers // count - 1 for layers in (anchor, augmenting)) for k in range(count)]
