"""Answers of a language model to a batch of prompts: generated, or chosen by log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..models.end_tokens import end_tokens, target_ids, turn_ends
from ..models.pretrained import context_of, is_seq2seq
from ..models.prompt import Prompt, PromptFormat
from ..training.batches import model_device
from .finite import checked
from .one_answer import one_answer

READ_PADDING = ("rwkv",)  # models without an attention mask


class Answerer:
    """A model and its tokenizer.

    Prompts, texts or what `PromptFormat` made of rows, are encoded as `moerge train-gates` encodes inputs: the
    tokenizer's own special tokens in front, none behind for a decoder.

    meter: a `Meter` that is told what the answers take; trace: a `RowTrace` of as many rows as prompts, in which a row
    counts until its answer ends; room: tokens that must fit the context beside a prompt and its choice.
    """

    meter: Any = None
    trace: Any = None
    room = 0

    @property
    def alone(self) -> bool:
        """Whether the model reads padding as text, so that prompts of several lengths cannot be asked together."""
        return getattr(self.model.config, "model_type", None) in READ_PADDING

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.seq2seq = is_seq2seq(model.config)
        self.ends = end_tokens(model, tokenizer)
        pad = (tokenizer.pad_token_id, *self.ends, 0)
        self.pad = next(token for token in pad if token is not None)

    facts: Mapping[str, Any] = {}  # what answers depend on besides the model and the task

    def ready(self) -> AbstractContextManager:
        """A block in which it answers; perhaps with what stands for the handle of a patched model."""
        return nullcontext()

    def prompts(self, rows: Sequence[Mapping[str, Any]], form: PromptFormat) -> list[Prompt]:
        """What `generate` and `log_likelihoods` take for rows of a task."""
        return [form.prompt(row, self.tokenizer) for row in rows]

    def prompt_ids(self, prompt: str | Prompt) -> list[int]:
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        return prompt.some_ids(self.tokenizer, self.ends, seq2seq=self.seq2seq)

    def target_ids(self, text: str, prompt: str | Prompt = "") -> list[int]:
        """Token ids of an answer to a prompt, with the end that it has there."""
        chat = isinstance(prompt, Prompt) and prompt.special
        ends = turn_ends(self.tokenizer, self.ends) if chat else self.ends
        return target_ids(self.tokenizer, text, ends, seq2seq=self.seq2seq)

    def check_length(self, length: int) -> None:
        """ValueError when `length` tokens do not fit the model's context."""
        context = context_of(self.model.config)
        if context is not None and length > context:
            raise ValueError(
                f"a prompt with its answer has {length} tokens, more than the context of {context}: shorten the "
                "inputs or the template, lower --max-new-tokens, or leave the task out"
            )

    def generate(self, prompts: Sequence[str | Prompt], max_new_tokens: int, **options: Any) -> list[str]:
        """Answers [N] in one batch, without white space around them; options as in `texts`."""
        return [text.strip() for text in self.texts(prompts, max_new_tokens, **options)]

    @torch.no_grad()
    def texts(
        self,
        prompts: Sequence[str | Prompt],
        max_new_tokens: int,
        *,
        counts: Sequence[int] | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model writes after each of N prompts in one batch, greedy unless `options` (of transformers'
        generate) say otherwise; with `counts` that many answers to each, for which its prompt is read once."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        ids, mask = self._padded(rows, left=not self.seq2seq)
        self.check_length(ids.shape[1] + (0 if self.seq2seq else max_new_tokens))
        # the ends that answers were trained with, of which a generation config may know nothing
        ends = {"eos_token_id": list(self.ends)} if self.ends else {}
        options = {"do_sample": False, "num_beams": 1, "pad_token_id": self.pad, **ends, **options}
        options["logits_processor"] = checked(options.get("logits_processor"))
        if self.trace is not None:
            options["stopping_criteria"] = [_UntilTheEnd(self.ends, self.trace)]
        if counts is not None:
            which = torch.repeat_interleave(torch.tensor(counts, device="cpu")).to(ids.device)
            with self._measured(), one_answer(self.model):
                options["past_key_values"] = self._read(ids, mask, which) if min(map(len, rows)) > 1 else None
            ids, mask = ids[which], mask[which]
        with self._measured(), one_answer(self.model):
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
            ).cpu()
        start = 0 if self.seq2seq else ids.shape[1]
        if self.meter is not None:
            written = [self._length(row) for row in out[:, start + int(self.seq2seq) :].tolist()]
            fed = written if self.seq2seq else [length - 1 for length in written]  # the last token is read by nobody
            self.meter.add(sum(map(len, rows)) + sum(fed), sum(written))
        return self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)

    def _read(self, ids: Tensor, mask: Tensor, which: Tensor) -> Any:
        """What the model's cache holds of all tokens but the last, the rows `which`; None where `generate` is to read
        the repeated prompts itself: its cache is not one of keys and values per token, or not all that it keeps."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        kept = any(hasattr(module, "rope_deltas") for module in self.model.modules())
        if self.seq2seq or kept or self.model.generation_config.cache_implementation is not None:
            return None
        asked = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
        out = self.model.generate(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], pad_token_id=self.pad, **asked)
        cache = getattr(out, "past_key_values", None)
        kinds = (DynamicLayer, DynamicSlidingWindowLayer)
        if type(cache) is not DynamicCache or not all(type(layer) in kinds for layer in cache.layers):
            return None
        cache.batch_select_indices(which)
        return cache

    def _length(self, written: list[int]) -> int:
        """Tokens of an answer, with its end and without the padding behind."""
        return next((i for i, token in enumerate(written, 1) if token in self.ends), len(written))

    def _measured(self):
        return nullcontext() if self.meter is None else self.meter.answering()

    @torch.no_grad()
    def log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str], *, length_norm: bool) -> Tensor:
        """log p(answer | prompt) [N] float64, the sum over the answer's tokens (with its end), or their mean."""
        tokens, real = self.token_log_likelihoods(prompts, answers)
        total = tokens.sum(1)
        return total / real.sum(1) if length_norm else total

    @torch.no_grad()
    def token_log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(log p(token | prompt, tokens before) [N,T] float64, 0 behind an answer's end; which are tokens [N,T])."""
        starts = [self.prompt_ids(prompt) for prompt in prompts]
        ends = [self.target_ids(answer, prompt) for prompt, answer in zip(prompts, answers, strict=True)]
        device = model_device(self.model)
        if self.meter is not None:
            self.meter.add(sum(map(len, starts)) + sum(map(len, ends)), len(starts))
        labels = nn.utils.rnn.pad_sequence(
            [torch.tensor(e, device="cpu") for e in ends], batch_first=True, padding_value=-100
        )
        labels = labels.to(device)
        if self.seq2seq:
            ids, mask = self._padded(starts, left=False)
            with self._measured():
                logits = self.model(input_ids=ids, attention_mask=mask, labels=labels).logits
                return _of_labels(logits, labels)
        # prompts end and answers begin in one column
        ids, mask = self._padded(starts, left=True)
        answer, answer_mask = self._padded(ends, left=False)
        width = ids.shape[1]
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, answer_mask], 1)
        self.check_length(max(len(start) + len(end) for start, end in zip(starts, ends, strict=True)))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with self._measured():
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            return _of_labels(logits[:, width - 1 : -1], labels)

    def _padded(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids, mask = (
            torch.full((len(rows), width), self.pad, device="cpu"),
            torch.zeros(len(rows), width, dtype=torch.long, device="cpu"),
        )
        for i, row in enumerate(rows):
            where = slice(width - len(row), None) if left else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row, device="cpu"), 1
        device = model_device(self.model)
        return ids.to(device), mask.to(device)


def _of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logits [N,L,V], labels [N,L] (-100: none) -> log-likelihoods [N,L] float64, 0 where none; where; on the CPU."""
    real = labels != -100
    chosen = logits.double().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return chosen.masked_fill(~real, 0.0).cpu(), real.cpu()


class _UntilTheEnd:
    """A stopping criterion of transformers' generate that stops nothing; tells a trace which rows go on."""

    def __init__(self, ends: Sequence[int], trace: Any):
        self.ends, self.trace = torch.tensor(ends, device="cpu"), trace

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = torch.isin(input_ids[:, -1], self.ends.to(input_ids.device))
        before = self.trace.live
        self.trace.live = ~ended if before is None else before & ~ended
        return torch.zeros_like(ended)
