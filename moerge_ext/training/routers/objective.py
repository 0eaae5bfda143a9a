"""What is minimized when routers are trained: the model's loss, and what keeps a router from collapsing.

    balance   - sum over experts e of log q_e,  q_e the mean weight of e over tokens and routers    (MoLE, section 3.4)
    z         mean over tokens and routers of logsumexp(scores)^2                     (ST-MoE, arXiv 2202.08906, eq. 5)

Padding counts in neither. Both are for training, as are the routers' own penalties; on validation data what the method
is about is measured alone: the model's loss ("language"), the entropy of its predictions ("entropy": no labels), or the
losses of every expert's data weighed by a preference ("tasks").
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...routing.patch import Handle
from ...routing.tokens import RealTokens
from ..batches import Batch, run_model
from ..loop import batch_loss
from .place import Dropped, layers_of

_LEAST = 1e-9  # of a mean weight, lest the logarithm of one that is exactly 0 be infinite


class Objective:
    """The loss of a batch on a model that is patched with the routers in training.

    balance, z: their coefficients; dropout: the share of experts that sits out each forward of training.
    """

    def __init__(self, handle: Handle, *, balance: float = 0.0, z: float = 0.0, dropout: float = 0.0):
        self.handle, self.balance, self.z = handle, balance, z
        self.dropped = Dropped(handle, dropout) if dropout else None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if not model.training:
            if self.dropped is not None:
                self.dropped.restore()
            return self.of_batch(model, batch)
        if self.dropped is not None:
            self.dropped.draw()
        if not (self.balance or self.z):
            return self._penalized(self.of_batch(model, batch))
        with self._collected() as seen:
            loss = self.of_batch(model, batch)
        if self.balance:
            loss = loss + self.balance * seen.balance()
        return self._penalized(loss + self.z * seen.z() if self.z else loss)

    def _penalized(self, loss: Tensor) -> Tensor:
        for weigher in self.handle.options["routers"].weighers.values():
            if (penalty := weigher.penalty()) is not None:
                loss = loss + penalty.to(loss.device)
        return loss

    def of_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the method is about; of a row that also reads queries, with every expert retrieved."""
        if self.handle.method.bias is None:
            return self.measured(model, batch)
        with self.handle._rows(torch.zeros(1, len(self.handle.names))):
            return self.measured(model, batch)

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar of one batch."""
        return batch_loss(model, batch)

    @contextmanager
    def _collected(self):
        handle = self.handle
        with ExitStack() as stack:
            seen, real = Weights(len(handle.names)), RealTokens(handle.model, stack, handle._state)
            if self.z:
                seen.watch(handle, stack)
            stack.enter_context(handle._state.block(trace=seen, tokens=real))
            yield seen


class Entropy(Objective):
    """The mean entropy of the next-token predictions: of all real tokens of a decoder-only model or an encoder, and of
    the labelled ones of an encoder-decoder. No label's value is looked at: test-time adaptation."""

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        seq2seq = getattr(model.config, "is_encoder_decoder", False)
        given = batch if seq2seq else {key: value for key, value in batch.items() if key != "labels"}
        logits = run_model(model, given).logits.float()
        if logits.dim() == 2:  # of a classifier
            return _entropy(logits).mean()
        if seq2seq:
            real = batch["labels"].to(logits.device) != -100
        else:
            mask = batch.get("attention_mask")
            real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if mask is None else mask != 0
        return _entropy(logits[real.to(logits.device)]).mean()


class Tasks(Objective):
    """sum_e p_e L_e over batches {"tasks": [one per expert]}; p is uniform on the simplex, and 1/E in `.eval()`."""

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        count = len(self.handle.names)
        p = torch.full((count,), 1 / count)
        if model.training:
            p = torch.empty(count).exponential_()
            p = p / p.sum()
        for weigher in self.handle.options["routers"].weighers.values():
            weigher.preference = p
        losses = [batch_loss(model, part) for part in batch["tasks"]]
        return sum(share * loss for share, loss in zip(p.tolist(), losses, strict=True))


OBJECTIVES = {"language": Objective, "entropy": Entropy, "tasks": Tasks}


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


class Weights:
    """The weights and scores of one forward, with their gradients; the layers add to it as to a `Trace`."""

    def __init__(self, experts: int):
        self.experts = experts
        self._graded = torch.is_grad_enabled()
        self._means: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._scores: dict[str, Tensor] = {}

    def add(
        self, module: str, weights: Tensor, experts: Tensor, real: Tensor | None = None, *_where: Tensor | None
    ) -> None:
        """One call of `module`: weights [T,K] of experts [T,K]; those where `real` [T] is False do not count."""
        if torch._C._current_graph_task_id() != -1:  # a checkpoint's recomputation
            return
        if self._graded and not torch.is_grad_enabled():
            raise ValueError(
                "balance and z need the weights' gradients, which reentrant gradient checkpointing drops: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        dense = weights.new_zeros(len(weights), self.experts).scatter_add(1, experts.long(), weights)
        self._means.append((dense if real is None else dense[real]).mean(0))
        if (scores := self._scores.pop(module, None)) is not None:
            squares = scores.logsumexp(-1).square()
            self._squares.append((squares if real is None else squares[real]).mean())

    def watch(self, handle: Handle, stack: ExitStack) -> None:
        """Computes the scores of every layer beside it."""
        for path, layer in layers_of(handle).items():
            stack.callback(layer.register_forward_pre_hook(_Scores(self, path)).remove)

    def balance(self) -> Tensor:
        """- sum_e log q_e."""
        mean = torch.stack(self._means).mean(0)
        return -mean.clamp_min(_LEAST).log().sum()

    def z(self) -> Tensor:
        """The mean of logsumexp(scores)^2."""
        return torch.stack(self._squares).mean()


class _Scores:
    """A forward pre-hook of a layer."""

    def __init__(self, seen: Weights, path: str):
        self.seen, self.path = seen, path

    def __call__(self, layer: Any, args: tuple) -> None:
        x = args[0].flatten(0, -2).float()
        if layer.gates is not None:
            self.seen._scores[self.path] = x @ layer.gates.T
        elif layer.weigher.reads is None:
            self.seen._scores[self.path] = layer.weigher.scores(x, layer)
