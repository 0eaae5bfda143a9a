"""One answer from several prompts: their next-token probabilities mixed at every step (PELMo, ICIC 2024, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, cycle
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..evaluation.answers import Answerer
from ..models.prompt import Prompt, PromptFormat
from ..routing.patch import Handle
from .drawing import DrawRows, one_token, own_warpers
from .prompts import PromptExpert, check_experts
from .router import PromptRouter, warn_of_other_experts
from .sampler import Sampler, Wish
from .template import Turns


class MixProbabilities:
    """A logits processor: K prompts of each of N questions, scores [K*N,V] -> the same mixture for all K [K*N,V].

        p(v | question) = sum_k w_nk softmax(scores_kn)_v          weights [N,K], fixed over the steps

    With `warpers` one token is drawn from the mixture and all others are excluded, so that the K rows of a question
    go on with the same token.
    """

    def __init__(self, weights: Tensor, warpers: Any = None, seed: int | None = None):
        self.weights, self.warpers = weights, warpers
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        count = self.weights.shape[1]
        mixed = ops.mix_log_probs(scores.view(count, -1, scores.shape[1]).contiguous(), self.weights)
        if self.warpers is not None:
            u = torch.rand(len(mixed), 1, generator=self.generator, dtype=torch.float32, device="cpu")
            mixed = one_token(self.warpers(input_ids[: len(mixed)], mixed), u)
        return mixed.repeat(count, 1).to(scores.dtype)


class FirstRow:
    """A streamer that hands on the first of the K rows, which all go the same way."""

    def __init__(self, streamer: Any):
        self.streamer = streamer

    def put(self, value: Tensor) -> None:
        self.streamer.put(value[:1])

    def end(self) -> None:
        self.streamer.end()


class _StopTexts:
    """A stopping criterion: rows whose answer holds one of the texts are done.

    The answer is decoded anew at every step, which works with every tokenizer; transformers' own stop strings need one
    whose tokens are pieces of text.
    """

    def __init__(self, asked: Answerer, stop: Sequence[str]):
        self.asked, self.stop, self.start = asked, tuple(stop), None

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.start is None:  # called first after one new token
            self.start = input_ids.shape[1] - 1
        texts = self.asked.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        done = [any(end in text for end in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)


class PromptEnsemble:
    """Prompt experts over one model, and the router that weighs them.

    Args:
        model, tokenizer: the backbone, causal or seq2seq. For experts with a `lora`, patched with method "given"
            (`handle` is its handle): each prompt then runs with its own LoRA in the same batch.
        experts: the prompt experts, in the order of the router's outputs.
        router: a `PromptRouter`; None leaves `answer` to `select=`. A warning says when it learned from experts of the
            same names that ask otherwise.
        form: with `chat` every prompt is a conversation of the tokenizer's chat template, its demonstrations the
            earlier turns. The template is how the caller makes questions of rows; `asked_with` compares it.
        seed: of the answers that answer prompting samples; each prompt has its own stream.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        experts: Sequence[PromptExpert],
        router: PromptRouter | None = None,
        *,
        handle: Handle | None = None,
        form: PromptFormat | None = None,
        seed: int = 0,
    ):
        self.form = form or PromptFormat()
        self.names, self.experts, self.router, self.handle = check_experts(experts), tuple(experts), router, handle
        if router is not None and router.names != self.names:
            raise ValueError(
                f"the router was trained for the experts {', '.join(router.names)}, got {', '.join(self.names)}"
            )
        loras = {expert.lora for expert in experts} - {None}
        if loras and (handle is None or handle.method.name != "given"):
            raise ValueError(
                f"experts with a LoRA ({', '.join(sorted(loras))}) need handle=patch(model, experts, method='given')"
            )
        unknown = sorted(loras - set(handle.names if handle is not None else ()))
        if unknown:
            raise ValueError(f"no LoRA expert named {', '.join(unknown)}; there are: {', '.join(handle.names)}")
        self.asked = Answerer(model, tokenizer)
        if self.asked.alone:
            raise ValueError(
                f"an ensemble asks its prompts in one batch, and models of type {model.config.model_type} read the "
                "padding of shorter ones as text: take a model with an attention mask"
            )
        self.sampler = Sampler(self._sample, seed, ["chat"] if self.form.chat else [])
        if router is not None:
            warn_of_other_experts(router, self.form, experts)

    def answer(
        self,
        questions: Sequence[str],
        *,
        top_k: int = 2,
        select: tuple[Tensor, Tensor] | None = None,
        max_new_tokens: int = 64,
        sample: bool = False,
        temperature: float = 1.0,
        top_p: float | None = None,
        top_k_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        streamer: Any = None,
    ) -> list[str]:
        """Answers [N], greedy unless `sample`.

        Args:
            top_k: experts per question, chosen and weighed by the router once, before the first token.
            select: (ids [N,k], weights [N,k]) instead of the router's choice.
            temperature, top_p, top_k_tokens, seed: of sampling, applied to the mixed distribution.
            stop: texts that end the answer; they are cut off.
            streamer: of transformers, for one question: gets the tokens as they are chosen.

        ValueError for no question, weights that do not fit, and a prompt that does not fit the context.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        if not questions:
            raise ValueError("no questions to answer: expected at least one")
        if streamer is not None and len(questions) > 1:
            raise ValueError(f"a streamer follows one question, got {len(questions)}")
        if not sample and (temperature != 1.0 or top_p is not None or top_k_tokens is not None):
            raise ValueError("temperature, top_p and top_k_tokens are for sample=True")
        if (top_p is not None and not 0 < top_p <= 1) or (top_k_tokens is not None and top_k_tokens < 1):
            raise ValueError(f"expected 0 < top_p <= 1 and top_k_tokens >= 1, got {top_p} and {top_k_tokens}")
        # imported here: `import moerge_ext` needs nothing of transformers' generation, which takes a while
        from transformers import LogitsProcessorList

        ids, weights = self._selected(questions, top_k, select)
        prompts = self._prompts(ids.T.flatten().tolist(), questions, max_new_tokens, stop)
        device = next(self.asked.model.parameters()).device
        asked = SimpleNamespace(temperature=float(temperature), top_p=top_p, top_k=top_k_tokens or 0)
        drawn = own_warpers(asked, device) if sample else None
        processor = MixProbabilities(weights.float().to(device), drawn, seed)
        with self._loras(ids.T.flatten().tolist()):
            texts = self.asked.generate(
                prompts,
                max_new_tokens,
                logits_processor=LogitsProcessorList([processor]),
                **self._stopping(stop),
                **({"streamer": FirstRow(streamer)} if streamer is not None else {}),
            )
        return [_cut(text, stop) for text in texts[: len(questions)]]

    @torch.no_grad()
    def log_likelihoods(
        self,
        questions: Sequence[str],
        answers: Sequence[str],
        *,
        top_k: int = 2,
        select: tuple[Tensor, Tensor] | None = None,
        length_norm: bool = True,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
    ) -> Tensor:
        """log P(answer | question) [N] float64 of the mixture: the mean over the answer's tokens (its end too), or sum.

            P(x_t | x_<t) = sum_k w_k P(x_t | x_<t, E_k)          section 2.3, eq. 4, the answer's tokens given

        max_new_tokens, stop: of the answers that answer prompting samples.
        """
        questions = list(questions)
        ids, weights = self._selected(questions, top_k, select)
        parts = []
        for column in ids.T.tolist():
            prompts = self._prompts(column, questions, max_new_tokens, stop)
            with self._loras(column):
                tokens, real = self.asked.token_log_likelihoods(prompts, answers)
            parts.append(tokens)
        shares = (weights.double() / weights.double().sum(1, keepdim=True)).log().T[..., None].to(real.device)
        mixed = (torch.stack(parts) + shares).logsumexp(0).masked_fill(~real, 0.0).sum(1)
        return mixed / real.sum(1) if length_norm else mixed

    def answer_by(self, name: str, questions: Sequence[str], **options: Any) -> list[str]:
        """Answers [N] of one expert alone."""
        if name not in self.names:
            raise ValueError(f"no prompt expert named '{name}'; there are: {', '.join(self.names)}")
        questions = [questions] if isinstance(questions, str) else list(questions)
        ids = torch.full((len(questions), 1), self.names.index(name), device="cpu")
        return self.answer(
            questions, select=(ids, torch.ones(len(questions), 1, dtype=torch.float32, device="cpu")), **options
        )

    def _selected(self, questions: list[str], top_k: int, select: tuple[Tensor, Tensor] | None):
        if select is None:
            if self.router is None:
                raise ValueError("this ensemble has no router: pass one, or select=(ids, weights)")
            return self.router.select(questions, top_k)
        ids, weights = torch.as_tensor(select[0], device="cpu"), select[1]
        weights = (
            weights if isinstance(weights, Tensor) else torch.as_tensor(weights, dtype=torch.float32, device="cpu")
        )
        fits = ids.dim() == 2 and ids.shape == weights.shape and len(ids) == len(questions) and ids.shape[1] > 0
        if not fits or ids.min() < 0 or ids.max() >= len(self.names):
            raise ValueError(
                f"select must be expert ids in 0 .. {len(self.names) - 1} and weights, both [N={len(questions)}, k], "
                f"got {list(ids.shape)} and {list(weights.shape)}"
            )
        if (weights < 0).any() or not weights.isfinite().all() or (weights.sum(1) <= 0).any():
            raise ValueError("weights must be finite and not negative, with a positive one for every question")
        return ids, weights

    def put(self, turns: Turns) -> Prompt:
        """The prompt as the model is given it."""
        return self.form.turns(turns.shots, turns.question, self.asked.tokenizer)

    def _prompts(self, ids: Sequence[int], questions: Sequence[str], limit: int, stop: Sequence[str]) -> list[Prompt]:
        """Prompt i is that of expert ids[i] for the questions in turn."""
        makers = [
            partial(self.experts[e].turns, question)
            for e, question in zip(ids, cycle(questions), strict=False)  # cycle never ends
        ]
        made = self.sampler.made(makers, rows=len(makers), limit=limit, stop=tuple(stop))
        return [self.put(turns) for turns in made]

    def _sample(self, wishes: list[Wish], stop: Sequence[str]) -> list[list[str]]:
        """The sampled answers of every wish, by the base model with its own generation settings."""
        base = (
            self.handle.affinities(torch.zeros(len(self.handle.names), dtype=torch.float32, device="cpu"))
            if self.handle is not None
            else nullcontext()
        )
        from transformers import LogitsProcessorList

        model, counts = self.asked.model, [wish.count for wish in wishes]
        drawn = own_warpers(model.generation_config, next(model.parameters()).device)
        draw = DrawRows(drawn, counts, [wish.seed for wish in wishes])
        prompts = [self.put(wish.prompt) for wish in wishes]
        with base:
            options = {"counts": counts, "logits_processor": LogitsProcessorList([draw]), **self._stopping(stop)}
            texts = [_cut(text, stop) for text in self.asked.generate(prompts, wishes[0].limit, **options)]
        return [texts[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]

    def _loras(self, order: Sequence[int]):
        """A context in which row i of the batch runs with the LoRA of expert order[i]."""
        if self.handle is None:
            return nullcontext()
        rows = torch.zeros(len(order), len(self.handle.names), dtype=torch.float32, device="cpu")
        for row, e in zip(rows, order, strict=True):
            if self.experts[e].lora is not None:
                row[self.handle.names.index(self.experts[e].lora)] = 1.0
        return self.handle.affinities(rows)

    def _stopping(self, stop: Sequence[str]) -> dict[str, Any]:
        from transformers import StoppingCriteriaList

        return {"stopping_criteria": StoppingCriteriaList([_StopTexts(self.asked, stop)])} if stop else {}


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.index(end) for end in stop if end in text]
    return text[: min(ends)].strip() if ends else text
