"""Co-LLM: base and experts of one model decode together, each token by one of them (`methods/deferral.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.answers import Answerer
from ..experts.bank import ExpertBank
from ..experts.routers import Routers
from ..methods import get_method
from ..methods.deferral import GATE, THETA, THRESHOLD, VOCABULARY, log_choice, speakers
from ..models.last_hidden import LastHidden, last_hidden, output_embeddings
from ..models.prompt import Prompt
from ..routing.patch import Handle, check_patch, patch
from ..routing.routed_branches import against_branches
from ..training.batches import model_device

METHOD = "co_llm"
BASE = "base"  # how the base is called among the speakers


class Defer:
    """A logits processor of N questions whose base and E experts are (1 + E) N rows, the base's first: every row gets
    the scores of the one that writes the token.

    counts [N,1+E]: tokens that each has written, of answers that have not ended.
    """

    def __init__(self, theta: Tensor, threshold: float, last: LastHidden, ends: Sequence[int]):
        self.theta, self.threshold, self.last = theta, threshold, last
        self.ends = torch.tensor(list(ends), dtype=torch.long, device="cpu")
        self.counts: Tensor | None = None
        self.live: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = 1 + len(self.theta)
        by_speaker = scores.view(rows, -1, scores.shape[1])
        count = by_speaker.shape[1]
        hidden = self.last.states[:count, -1]
        who = speakers(log_choice(self.theta, hidden), self.threshold).to(scores.device)
        self._count(who.cpu(), input_ids[:count, -1].cpu(), rows)
        return by_speaker[who, torch.arange(count, device=scores.device)].repeat(rows, 1)

    def _count(self, who: Tensor, before: Tensor, rows: int) -> None:
        if self.counts is None:
            self.counts = torch.zeros(len(who), rows, dtype=torch.long, device="cpu")
            self.live = torch.ones(len(who), dtype=torch.bool, device="cpu")
        else:
            self.live &= ~torch.isin(before, self.ends)
        self.counts[torch.arange(len(who), device="cpu"), who] += self.live


class CoLLM(Answerer):
    """Answers of a base and its experts together; `answerers={label: CoLLM(...)}` of `evaluate`.

    Args:
        model, tokenizer: the base, causal or encoder-decoder; unpatched. It is patched, in `ready` or for each call.
        experts: the bank that the gate was trained with.
        routers: what `train_routers(method="co_llm")` wrote: the file, its folder, or `Routers`.
        threshold: an expert writes where the base's chance is below 1 - threshold; None takes the file's.

    `written` [N,1+E] says, after `generate` and `texts`, how many tokens of each answer `names` have written.

    ValueError, with names, for routers of another method, bank or base.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        experts: ExpertBank,
        routers: Any,
        *,
        threshold: float | None = None,
        backend: str = "native",
        **options: Any,
    ):
        super().__init__(model, tokenizer)
        row = get_method(METHOD)
        if routers is None:
            raise ValueError(
                f"method '{METHOD}' needs a gate that was trained over these experts: `moerge train-routers --method "
                f"{METHOD}`, then --routers FILE"
            )
        options = row.configure(routers=routers, threshold=threshold, **options)[2]
        source: Routers = options["routers"].source
        problems = source.problems(METHOD, experts) + against_branches(row, model, experts.modules)
        problems += _other_base(source, model)
        if problems:
            raise ValueError(f"cannot answer with method '{METHOD}':\n" + "\n".join(f"  - {p}" for p in problems))
        check_patch(model, experts, "given", backend=backend, top_k=1)
        held = source.tensors[GATE]
        self.experts, self.backend, self.names = experts, backend, (BASE, *experts.names)
        self.threshold = float(held[THRESHOLD]) if options["threshold"] is None else float(options["threshold"])
        self._theta, self.handle, self.written = held[THETA].float(), None, None

    @property
    def theta(self) -> Tensor:
        """[E,D], where the model computes."""
        return self._theta.to(model_device(self.model))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """A block in which the model is patched; without it, every call patches it anew."""
        with patch(self.model, self.experts, "given", backend=self.backend, top_k=1) as handle:
            self.handle = handle
            try:
                yield
            finally:
                self.handle = None

    def texts(self, prompts: Sequence[str | Prompt], max_new_tokens: int, **options: Any) -> list[str]:
        """What they write together after each of N prompts; greedy. ValueError for sampling and beams."""
        if options.get("do_sample") or options.get("num_beams", 1) != 1:
            raise ValueError(f"method '{METHOD}' decodes greedily: leave sampling and beams out")
        # imported here: `import moerge_ext` needs nothing of transformers' generation, which takes a while
        from transformers import LogitsProcessorList

        count = len(prompts)
        with self._patched() as handle, last_hidden(self.model) as last:
            defer = Defer(self.theta, self.threshold, last, self.ends)
            with handle.affinities(self._rows(count)):
                processors = LogitsProcessorList([defer])
                many = list(prompts) * len(self.names)
                texts = super().texts(many, max_new_tokens, logits_processor=processors, **options)
        self.written = defer.counts
        return texts[:count]

    @torch.no_grad()
    def token_log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log sum_z P(z | h_t) P_z(x_t | x_<t) [N,T] float64, 0 behind an answer's end; which are tokens [N,T])."""
        parts = []
        with self._patched() as handle:
            for e in range(len(self.names)):
                with handle.affinities(self._rows(1)[e]), last_hidden(self.model) as last:
                    tokens, real = super().token_log_likelihoods(prompts, answers)
                    if not e:
                        hidden = last.states if self.seq2seq else last.states[:, -real.shape[1] - 1 : -1]
                        chances = log_choice(self.theta.double(), hidden)
                parts.append(tokens)
        mixed = (torch.stack(parts, -1) + chances.cpu()).logsumexp(-1)
        return mixed.masked_fill(~real, 0.0), real

    def _rows(self, count: int) -> Tensor:
        """[(1 + E) count, E]: the base's rows, then those of each expert."""
        experts = torch.eye(len(self.names) - 1, dtype=torch.float32, device="cpu")
        return torch.cat([torch.zeros_like(experts[:1]), experts]).repeat_interleave(count, 0)

    @contextmanager
    def _patched(self) -> Iterator[Handle]:
        with self.ready() if self.handle is None else nullcontext():
            yield self.handle


def _other_base(source: Routers, model: nn.Module) -> list[str]:
    """Why the gate is not for this base."""
    held, vocabulary = source.tensors.get(GATE, {}), output_embeddings(model).weight
    known, width = vocabulary.shape
    wanted = {THETA: (len(source.names), width), THRESHOLD: (1,)}
    found = {name: tuple(tensor.shape) for name, tensor in held.items()}
    problems = []
    if found != wanted:
        said = ", ".join(f"{name} {list(shape)}" for name, shape in found.items()) or "none"
        problems.append(
            f"expected a gate of {THETA} {list(wanted[THETA])} (experts, the base's width) and {THRESHOLD} [1], the "
            f"file's is {said}: train it for this base"
        )
    elif not 0 <= float(held[THRESHOLD]) <= 1:
        problems.append(f"the file is damaged: its threshold must be in [0, 1], got {float(held[THRESHOLD]):g}")
    if source.options.get(VOCABULARY) != known:
        problems.append(
            f"the gate was trained with a base of {source.options.get(VOCABULARY)} tokens, this one has {known}"
        )
    return problems
