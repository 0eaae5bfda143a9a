"""What the router did: per-module expert load, collected by `with handle.record() as trace:`."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..files.counting import counted

_ADDING = threading.Lock()


class Trace:
    """Sums over every real token that passed while recording.

    Padding does not count: in a decoder-only model or an encoder the tokens where `attention_mask` is 0; in the decoder
    of an encoder-decoder those where `decoder_attention_mask` is 0 or, without one, where `labels` is -100. A module
    whose input has other leading sizes than the mask (a pooler's [N, D], the image of a vision tower) counts every row,
    as everything does without a mask. A pass that gradient checkpointing repeats in backward is counted once.

    Args:
        names: the experts, in the order of every [E] tensor here.
        tokens: also keep each call's weights [T,K] and experts [T,K] in `calls` (memory grows with the tokens).
    """

    def __init__(self, names: tuple[str, ...], tokens: bool = False):
        self.names = names
        self.calls: dict[str, list[tuple[Tensor, Tensor]]] | None = {} if tokens else None
        self._weight: dict[str, Tensor] = {}
        self._count: dict[str, Tensor] = {}

    def add(
        self,
        module: str,
        weights: Tensor,
        experts: Tensor,
        real: Tensor | None = None,
        x: Tensor | None = None,
        token: Tensor | None = None,
    ) -> None:
        """Counts one call of `module`: weights [T,K] and experts [T,K] of the tokens where `real` [T] is True (None: of
        all); slots of weight 0 do not count.

        x: the input [..., D] that the tokens lie in, and token: [T] which of its tokens each line is of (None: all, in
        order); for a trace that asks.
        """
        # inside backward only a checkpoint's recomputation runs a forward
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        if torch.compiler.is_compiling():
            self._add(module, weights.detach(), experts.detach(), real, x, token)
        else:
            with _ADDING:  # threads begun inside of one block add to one trace
                self._add(module, weights.detach(), experts.detach(), real, x, token)

    def _add(self, module: str, weights: Tensor, experts: Tensor, real: Tensor | None, *_where: Tensor | None) -> None:
        if module not in self._weight:
            # a tensor made in inference mode could not be added to outside of it
            with torch.inference_mode(False):
                self._weight[module] = torch.zeros(len(self.names), dtype=torch.float64, device=weights.device)
                self._count[module] = torch.zeros(len(self.names), dtype=torch.float64, device=weights.device)
        ids, flat = experts.flatten().long(), weights.double()
        if real is not None:
            flat = torch.where(real[:, None], flat, torch.zeros_like(flat))
        flat = flat.flatten()
        self._weight[module].scatter_add_(0, ids, flat)
        self._count[module].scatter_add_(0, ids, (flat != 0).double())
        if self.calls is not None:
            kept = (weights, experts) if real is None else (weights[real], experts[real])
            self.calls.setdefault(module, []).append((kept[0].cpu(), kept[1].cpu()))

    def load(self) -> dict[str, Tensor]:
        """Module -> [E] float64: the sum of each expert's routing weights."""
        return {module: weight.cpu() for module, weight in self._weight.items()}

    def counts(self) -> dict[str, Tensor]:
        """Module -> [E] int64: how many tokens selected each expert with a weight other than 0."""
        return {module: count.cpu().long() for module, count in self._count.items()}

    def share(self) -> Tensor:
        """[E] float64: each expert's part of all routing weight, over all modules; sums to 1 under softmax weights."""
        if not self._weight:
            return torch.zeros(len(self.names), dtype=torch.float64, device="cpu")
        total = torch.stack([w.cpu() for w in self._weight.values()]).sum(0)
        return total / total.sum().clamp_min(torch.finfo(torch.float64).tiny)

    def __repr__(self) -> str:
        top = sorted(zip(self.share().tolist(), self.names, strict=True), reverse=True)[:5]
        parts = ", ".join(f"{name} {share:.0%}" for share, name in top)
        return f"Trace({counted(len(self._weight), 'module')}; {parts})"
