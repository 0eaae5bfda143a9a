"""What is minimized when routers are trained: the model's loss, and what keeps a router from collapsing.

    balance   - sum over experts e of log q_e,  q_e the mean weight of e over tokens and routers    (MoLE, section 3.4)
    z         mean over tokens and routers of logsumexp(scores)^2                     (ST-MoE, arXiv 2202.08906, eq. 5)
    sparsity  mean over modules of sum_e w_e (1 - cos(y, z_e)): w_e the mean weight, y what the module gives, z_e what
              expert e adds, over all tokens as one vector                                                (PEMT's code)

Padding counts in none. All are for training, as are the routers' own penalties; on validation data what the method
is about is measured alone: the model's loss ("language"), the entropy of its predictions ("entropy": no labels), or the
losses of every expert's data weighed by a preference ("tasks").
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

    balance, z, sparsity: their coefficients; dropout: the share of experts that sits out each forward of training.
    """

    def __init__(
        self, handle: Handle, *, balance: float = 0.0, z: float = 0.0, dropout: float = 0.0, sparsity: float = 0.0
    ):
        self.handle, self.balance, self.z, self.sparsity = handle, balance, z, sparsity
        self.dropped = Dropped(handle, dropout) if dropout else None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if not model.training:
            if self.dropped is not None:
                self.dropped.restore()
            return self.of_batch(model, batch)
        if self.dropped is not None:
            self.dropped.draw()
        if not (self.balance or self.z or self.sparsity):
            return self._penalized(self.of_batch(model, batch))
        with self._collected() as seen:
            loss = self.of_batch(model, batch)
        if self.balance:
            loss = loss + self.balance * seen.balance()
        if self.sparsity:
            loss = loss + self.sparsity * seen.sparsity()
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
        with self.handle._rows(torch.zeros(1, len(self.handle.names), dtype=torch.float32, device="cpu")):
            return self.measured(model, batch)

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar of one batch."""
        return batch_loss(model, batch)

    @contextmanager
    def _collected(self):
        handle = self.handle
        with ExitStack() as stack:
            seen, real = Weights(len(handle.names)), RealTokens(handle.model, stack, handle._state)
            if self.z or self.sparsity:
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
            mask, kept = batch.get("attention_mask"), batch.get("logits_to_keep", 0)
            if mask is None:
                real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
            else:
                real = mask[:, slice(-kept, None) if isinstance(kept, int) else kept] != 0
        return _entropy(logits[real.to(logits.device)]).mean()


class Tasks(Objective):
    """sum_e p_e L_e over batches {"tasks": [one per expert]}; p is uniform on the simplex, and 1/E in `.eval()`."""

    def measured(self, model: nn.Module, batch: Batch) -> Tensor:
        count = len(self.handle.names)
        p = torch.full((count,), 1 / count, dtype=torch.float32, device="cpu")
        if model.training:
            p = torch.empty(count, dtype=torch.float32, device="cpu").exponential_()
            p = p / p.sum()
        for weigher in self.handle.options["routers"].weighers.values():
            weigher.preference = p
        losses = [batch_loss(model, part) for part in batch["tasks"]]
        return sum(share * loss for share, loss in zip(p.tolist(), losses, strict=True))


OBJECTIVES = {"language": Objective, "entropy": Entropy, "tasks": Tasks}


def _entropy(logits: Tensor) -> Tensor:
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


@dataclass
class _Call:
    """One call of a layer: its weights [T,K] of experts [T,K], which tokens are real [T], perhaps what it read and
    gave.

    Nothing is computed of them inside of the layer: what a checkpoint computes again must save the same tensors.
    """

    weights: Tensor
    experts: Tensor
    real: Tensor | None
    layer: Any = None
    x: Tensor | None = None  # [T,D]
    y: Tensor | None = None  # [T,O]
    versions: tuple[int, ...] = ()

    def keep(self, layer: Any, x: Tensor, y: Tensor) -> None:
        """What the layer read and gave, as it is now."""
        self.layer, self.x, self.y = layer, x.flatten(0, -2), y.flatten(0, -2)
        self.versions = (x._version, y._version)

    def check(self) -> None:
        """RuntimeError when the model has written into them since."""
        if self.versions and (self.x._version, self.y._version) != self.versions:
            raise RuntimeError(
                f"{self.layer.name}: the model writes into what this layer reads or gives, so that z and sparsity "
                "cannot be computed of it: leave the module out, load_experts(..., modules=...), or the losses"
            )

    def of_real(self, values: Tensor) -> Tensor:
        return values if self.real is None else values[self.real]

    def mean_weights(self, experts: int) -> Tensor:
        """[E]."""
        dense = self.weights.new_zeros(len(self.weights), experts)
        return self.of_real(dense.scatter_add(1, self.experts.long(), self.weights)).mean(0)

    def scores(self) -> Tensor | None:
        """[T,E] of real tokens, None where they are not the layer's own."""
        if self.layer.gates is not None:
            return self.of_real(self.x.float() @ self.layer.gates.T)
        weigher = self.layer.weigher
        return self.of_real(weigher.scores(self.x.float(), self.layer)) if weigher.reads is None else None


class Weights:
    """What the layers did in one forward, with its gradients; they add to it as to a `Trace`."""

    def __init__(self, experts: int):
        self.experts = experts
        self._graded = torch.is_grad_enabled()
        self._calls: list[_Call] = []

    def add(
        self, module: str, weights: Tensor, experts: Tensor, real: Tensor | None = None, *_where: Tensor | None
    ) -> None:
        """One call of `module`: weights [T,K] of experts [T,K]; those where `real` [T] is False do not count."""
        if self._graded and not torch.is_grad_enabled():
            raise ValueError(
                "balance, z and sparsity need the weights' gradients, which reentrant gradient checkpointing drops: "
                "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )
        self._calls.append(_Call(weights, experts, real))

    def watch(self, handle: Handle, stack: ExitStack) -> None:
        """Keeps what every layer reads and gives."""
        for layer in layers_of(handle).values():
            stack.callback(layer.register_forward_hook(self._keep).remove)

    def _keep(self, layer: Any, args: tuple, output: Tensor) -> None:
        """A forward hook of a layer, right after its `add`."""
        self._calls[-1].keep(layer, args[0], output)

    def _check(self) -> None:
        for call in self._calls:
            call.check()

    def balance(self) -> Tensor:
        """- sum_e log q_e."""
        mean = torch.stack([call.mean_weights(self.experts) for call in self._calls]).mean(0)
        return -mean.clamp_min(_LEAST).log().sum()

    def z(self) -> Tensor:
        """The mean of logsumexp(scores)^2."""
        self._check()
        scores = [call.scores() for call in self._calls]
        return torch.stack([one.logsumexp(-1).square().mean() for one in scores if one is not None]).mean()

    def sparsity(self) -> Tensor:
        """The mean over modules of sum_e w_e (1 - cos(y, z_e))."""
        self._check()
        found = []
        for call in self._calls:
            apart = 1 - cosines(call.of_real(call.y).float(), call.of_real(call.x).float(), call.layer)
            found.append((call.mean_weights(self.experts) * apart).sum())
        return torch.stack(found).mean()


def cosines(y: Tensor, x: Tensor, layer: Any) -> Tensor:
    """y [T,O], x [T,D] -> cos(y, z_e) [E], z_e [T,O] what expert e adds; 0 for one that adds nothing.

    Of z_e = h_e B_e^T alone h_e [T,R] is held: |z_e|^2 = sum((h_e^T h_e) * (B_e^T B_e)).
    """
    down, up = layer.lora_A.float(), layer.lora_B.float()
    h = torch.einsum("td,erd->etr", x, down)
    if layer.lora_bias is not None:
        h = torch.cat([h, torch.ones_like(h[..., :1])], -1)
        up = torch.cat([up, layer.lora_bias.float()[..., None]], -1)
    products = (torch.einsum("to,etr->eor", y, h) * up).sum((1, 2))
    squares = (torch.einsum("etr,ets->ers", h, h) * torch.einsum("eor,eos->ers", up, up)).sum((1, 2))
    return products / (squares.clamp_min(_LEAST**2).sqrt() * y.norm().clamp_min(_LEAST))
