"""Answers of a language model to a batch of prompts: generated, or chosen by log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.end_tokens import end_tokens, target_ids
from ..models.pretrained import context_of, is_seq2seq
from ..models.prompt import Prompt
from ..training.batches import model_device


class Answerer:
    """A model and its tokenizer.

    Prompts, texts or what `PromptFormat` made of rows, are encoded as `moerge train-gates` encodes inputs: the
    tokenizer's own special tokens in front, none behind for a decoder.
    """

    def __init__(self, model: nn.Module, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.seq2seq = is_seq2seq(model.config)
        self.ends = end_tokens(model, tokenizer)
        pad = (tokenizer.pad_token_id, *self.ends, 0)
        self.pad = next(token for token in pad if token is not None)

    def prompt_ids(self, prompt: str | Prompt) -> list[int]:
        prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
        return prompt.some_ids(self.tokenizer, self.ends, seq2seq=self.seq2seq)

    def target_ids(self, text: str) -> list[int]:
        return target_ids(self.tokenizer, text, self.ends, seq2seq=self.seq2seq)

    def check_length(self, length: int) -> None:
        """ValueError when `length` tokens do not fit the model's context."""
        context = context_of(self.model.config)
        if context is not None and length > context:
            raise ValueError(
                f"a prompt with its answer has {length} tokens, more than the context of {context}: shorten the "
                "inputs or the template, lower --max-new-tokens, or leave the task out"
            )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str | Prompt], max_new_tokens: int, **options: Any) -> list[str]:
        """Answers [N] in one batch, greedy unless `options` (of transformers' generate) say otherwise."""
        rows = [self.prompt_ids(prompt) for prompt in prompts]
        ids, mask = self._padded(rows, left=not self.seq2seq)
        self.check_length(ids.shape[1] + (0 if self.seq2seq else max_new_tokens))
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            **{"do_sample": False, "num_beams": 1, "pad_token_id": self.pad, **options},
        )
        start = 0 if self.seq2seq else ids.shape[1]
        return [text.strip() for text in self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)]

    @torch.no_grad()
    def log_likelihoods(self, prompts: Sequence[str | Prompt], answers: Sequence[str], *, length_norm: bool) -> Tensor:
        """log p(answer | prompt) [N] float64, the sum over the answer's tokens (with its end), or their mean."""
        starts, ends = [self.prompt_ids(p) for p in prompts], [self.target_ids(a) for a in answers]
        device = model_device(self.model)
        labels = nn.utils.rnn.pad_sequence([torch.tensor(e) for e in ends], batch_first=True, padding_value=-100)
        labels = labels.to(device)
        if self.seq2seq:
            ids, mask = self._padded(starts, left=False)
            logits = self.model(input_ids=ids, attention_mask=mask, labels=labels).logits
        else:
            # prompts end and answers begin in one column
            ids, mask = self._padded(starts, left=True)
            answer, answer_mask = self._padded(ends, left=False)
            width = ids.shape[1]
            ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, answer_mask], 1)
            self.check_length(max(len(start) + len(end) for start, end in zip(starts, ends, strict=True)))
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            logits = logits[:, width - 1 : -1]
        real = labels != -100
        chosen = logits.double().log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        total = (chosen * real).sum(1)
        return total / real.sum(1) if length_norm else total

    def _padded(self, rows: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.full((len(rows), width), self.pad), torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), None) if left else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row), 1
        device = model_device(self.model)
        return ids.to(device), mask.to(device)
