"""Co-LLM's gate: weak labels first, then the likelihood of the data with the choice of the speaker summed out.

The equations are `methods/deferral.py`'s. Base and experts are read without gradients: a step is 1 + E forwards.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...experts.bank import ExpertBank
from ...methods.deferral import (
    GATE,
    THETA,
    THRESHOLD,
    VOCABULARY,
    log_choice,
    marginal_loss,
    speakers,
    weak_labels,
    weak_loss,
)
from ...models.last_hidden import last_hidden, output_embeddings
from ...models.pretrained import is_seq2seq
from ...routing.patch import Handle, patch
from ...routing.routed_branches import against_branches
from ..batches import Batch, BatchSource, run_model
from ..frozen import Frozen
from ..loop import fit
from ..options import TrainingResult
from ..ranks import current_ranks
from .run import STATE_FILE, Run

INIT_FILE = "moerge_routers.init.checkpoint.safetensors"
EVEN = 0.5  # the threshold that nothing was known of
SHARES = 10  # thresholds tried: those that defer 0, 1/10, ..., 1 of the tokens


class Heard:
    """What base and experts say of the labelled tokens of a batch, in `.eval()` mode and without gradients."""

    def __init__(self, handle: Handle):
        self.handle = handle

    @torch.no_grad()
    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(h [n,D] of the base, log P_z(x_t) [n,1+E] float32, whether x_t is z's likeliest token [n,1+E])."""
        if not isinstance(batch.get("labels"), Tensor):
            raise ValueError(f"Co-LLM learns from labels: expected them in a batch, got {sorted(batch)}")
        shift = 0 if is_seq2seq(model.config) else 1
        labels = batch["labels"][:, shift:]
        real, found, training = labels != -100, [], model.training
        model.eval()
        try:
            for e in range(1 + len(self.handle.names)):
                with speaking(self.handle, e), last_hidden(model) as last:
                    logits = run_model(model, batch).logits
                    if not e:
                        hidden = self._labelled(last.states, real, shift)
                said, asked = self._labelled(logits, real, shift), labels[real].to(logits.device)
                chosen = said.log_softmax(-1).gather(-1, asked[:, None])[:, 0]
                found.append((chosen.to(hidden.device), (said.argmax(-1) == asked).to(hidden.device)))
        finally:
            model.train(training)
        return hidden, *(torch.stack(part, 1) for part in zip(*found, strict=True))

    @staticmethod
    def _labelled(states: Tensor, real: Tensor, shift: int) -> Tensor:
        """[N,T,...] -> float32 [n,...] of the positions that say the labelled tokens."""
        return states[:, : states.shape[1] - shift][real.to(states.device)].float()


@contextmanager
def speaking(handle: Handle, e: int):
    """The base alone for 0, else with expert number e alone (from 1), in a model patched with method "given"."""
    if not e:
        with handle.disabled():
            yield
        return
    alone = torch.zeros(len(handle.names), dtype=torch.float32, device="cpu")
    alone[e - 1] = 1.0
    with handle.affinities(alone):
        yield


class DeferralRun(Run):
    """One training of the gate."""

    state_files = (INIT_FILE, STATE_FILE)

    def _patched(self, model: nn.Module, experts: ExpertBank) -> Handle:
        self.settings = self.row.configure(**self.options)[2]
        if problems := against_branches(self.row, model, experts.modules):
            raise ValueError(problems[0])
        handle = patch(model, experts, "given", top_k=1)
        self._refuse_stacked(handle)
        return handle

    def _train(
        self,
        handle: Handle,
        sources: tuple[BatchSource, BatchSource | None],
        still: Frozen,
        settings: dict[str, Any],
        marks: dict[str, Tensor],
        file: Path,
    ) -> TrainingResult:
        vocabulary = output_embeddings(handle.model).weight
        first = vocabulary.detach().float().mean(0)
        theta = first.repeat(len(handle.names), 1).requires_grad_(True)
        hear, parameters, label = Heard(handle), {f"{GATE}/{THETA}": theta}, f"gate of {self.row.name}"
        shared = {"still": still, "settings": settings}
        if self.settings["init_steps"]:
            weak = replace(self.training, steps=self.settings["init_steps"])
            fit(
                handle.model, parameters, sources[0], weak, **shared, state_file=INIT_FILE,
                label=f"{label}, weak labels", loss=self._weak(hear, theta),
            )  # fmt: skip
        state = fit(
            handle.model, parameters, sources[0], self.training, **shared, state_file=STATE_FILE, label=label,
            validation=sources[1], loss=lambda model, batch: _marginal(theta, *hear(model, batch)),
        )  # fmt: skip
        threshold = current_ranks().from_first(lambda: self._threshold(handle.model, hear, theta, sources[1]))
        kept = {name: self.settings[name] for name in self.row.learned.kept} | {VOCABULARY: len(vocabulary)}
        tensors = parameters | {f"{GATE}/{THRESHOLD}": torch.tensor([threshold], dtype=torch.float32, device="cpu")}
        return self._write(handle, state, tensors, settings, marks, file, kept, theta.shape[1])

    def _weak(self, hear: Heard, theta: Tensor):
        def loss(model: nn.Module, batch: Batch) -> Tensor:
            hidden, log_probs, right = hear(model, batch)
            return weak_loss(theta, hidden, weak_labels(right, log_probs), self.settings["init_weight"])

        return loss

    @torch.no_grad()
    def _threshold(self, model: nn.Module, hear: Heard, theta: Tensor, held_out: BatchSource | None) -> float:
        """Where the speakers' likeliest tokens are right most often; of equals the one that defers least."""
        if held_out is None:
            return EVEN
        chances, rights = [], []
        for batch in held_out.epoch():
            hidden, _, right = hear(model, batch)
            chances.append(log_choice(theta, hidden))
            rights.append(right)
        return best_threshold(torch.cat(chances), torch.cat(rights))


def _marginal(theta: Tensor, hidden: Tensor, log_probs: Tensor, right: Tensor) -> Tensor:
    return marginal_loss(theta, hidden, log_probs)


def best_threshold(chances: Tensor, right: Tensor) -> float:
    """log P(z | h) [n,1+E], who is right [n,1+E] -> of the thresholds that defer 0, 10, ..., 100 % of the n tokens the
    one under which most are right."""
    deferred = -torch.expm1(chances[:, 0])
    shares = torch.linspace(1, 0, SHARES + 1, device=deferred.device, dtype=torch.float32)
    best, found = -1.0, 1.0
    for threshold in [*deferred.quantile(shares).tolist(), 0.0]:
        score = right.gather(1, speakers(chances, threshold)[:, None]).float().mean().item()
        if score > best:
            best, found = score, threshold
    return found
