"""Examples as token ids and batches: what training and the search of weights give the model."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..files.counting import counted
from ..files.examples import as_example
from ..files.listing import at_rows
from ..files.rows import MAX_LISTED
from ..models.end_tokens import end_tokens, target_ids, turn_ends
from ..models.pretrained import context_of, is_seq2seq, one_start
from ..models.prompt import PromptFormat
from ..models.wrappers import unwrapped
from .batches import Batch, BatchSource, Collate, as_source

IGNORED = -100  # the label that no loss counts
UNCUT = 2**62  # tokens
MAX_LENGTH = 512  # tokens per sequence, of PHATGOOSE, arXiv 2402.05859, section 4.1


@dataclass
class Encoder:
    """Turns rows of text into what `model` trains on: those of `as_example` (the loss is on the target) or {"text"}.

    tokenizer: the model's; max_length: tokens per sequence, never more than the model has positions; prompt: how the
    inputs are put. `cut` counts the rows that were longer.
    """

    model: Any
    tokenizer: Any
    max_length: int = MAX_LENGTH
    prompt: PromptFormat = PromptFormat()
    cut: int = 0

    def features(self, rows: Iterable[Mapping[str, Any]], name: str = "data") -> list[dict[str, list[int]]]:
        """Every row encoded. One ValueError with all rows that cannot be."""
        options = {"seq2seq": is_seq2seq(self.model.config), "ends": self.ends, "prompt": self.prompt}
        features, causes = [], {}
        for number, row in enumerate(rows):
            try:
                feature = encode(row, self.tokenizer, UNCUT, **options)
            except ValueError as error:
                causes.setdefault(str(error), []).append(number)
                continue
            if max(map(len, feature.values())) > self.length:
                self.cut += 1
                feature = encode(row, self.tokenizer, self.length, **options)
            features.append(feature)
        problems = [f"{at_rows(numbers)}: {cause}" for cause, numbers in causes.items()]
        if not features and not problems:
            problems.append("there are no rows")
        if problems:
            more = [f"... and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
            raise ValueError(f"{name} cannot be used:\n- " + "\n- ".join(problems[:MAX_LISTED] + more))
        return features

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """What ends an answer; asked once, as it may warn."""
        return end_tokens(self.model, self.tokenizer)

    def warn_of_cut(self, total: int) -> None:
        """Says how many of all rows were longer, once."""
        if self.cut:
            cut = f"{self.cut} of {counted(total, 'row')} {'is' if self.cut == 1 else 'are'}"
            warnings.warn(
                f"{cut} longer than {self.length} tokens: the beginning of their input, or "
                "the end of their target, is cut off",
                stacklevel=5,
            )

    @property
    def length(self) -> int:
        """Tokens per sequence that fit both limits."""
        context = context_of(self.model.config)
        return self.max_length if context is None else min(self.max_length, context)


@dataclass(frozen=True)
class Prepared:
    """Data that can be batched; `digest` tells rows of text apart, None for data of which nothing is known.

    prompt: how the inputs of the rows are put, None where there is no input or that is not known.
    """

    data: Any
    validation: Any
    collate_fn: Collate | None
    digest: str | None = None
    prompt: PromptFormat | None = None

    def sources(self, batch_size: int, shuffle: bool, seed: int) -> tuple[BatchSource, BatchSource | None]:
        """(training data, validation data or None), in batches."""
        return as_source(
            self.data,
            self.validation,
            collate_fn=self.collate_fn,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            digest=self.digest,
        )


def prepare(
    model: Any,
    data: Any,
    validation: Any,
    *,
    tokenizer: Any,
    max_length: int,
    collate_fn: Collate | None,
    prompt: PromptFormat | None = None,
) -> Prepared:
    """With a `tokenizer` rows of text are encoded, otherwise all is as given. ValueError for what does not fit."""
    if tokenizer is None:
        if prompt is not None:
            raise ValueError("prompt= says how rows of text are put: pass tokenizer= and rows of text with it")
        if collate_fn is None and holds_text(data):
            raise ValueError(
                f"data holds rows of text (keys {sorted(data[0])}): pass tokenizer=, the model's, to have them encoded"
            )
        return Prepared(data, validation, collate_fn)
    if collate_fn is not None:
        raise ValueError("pass tokenizer= for rows of text or collate_fn= for features of your own, not both")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    prompt, data = prompt or PromptFormat(), list(data)
    encoder = Encoder(unwrapped(model), tokenizer, max_length, prompt)
    features = encoder.features(data)
    held_out = None if validation is None else encoder.features(validation, "validation")
    encoder.warn_of_cut(len(features) + len(held_out or ()))
    digest = hashlib.sha256(json.dumps([features, held_out]).encode()).hexdigest()
    return Prepared(features, held_out, collator(tokenizer), digest, prompt.seen_in(data))


def holds_text(data: Any) -> bool:
    """Whether the first of the rows has a field of text, or of messages; False for what is no list of rows."""
    first = data[0] if isinstance(data, Sequence) and not isinstance(data, str) and data else None
    return isinstance(first, Mapping) and any(map(_is_text, first.values()))


def _is_text(value: Any) -> bool:
    """Whether a field of a row is a text, or messages."""
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], Mapping))


def encode(
    row: Mapping[str, Any],
    tokenizer: Any,
    max_length: int,
    *,
    seq2seq: bool,
    ends: Sequence[int] | None = None,
    prompt: PromptFormat | None = None,
) -> dict[str, list[int]]:
    """One example as token ids: "input_ids" and "labels". ValueError for a row that `prompt` or the model cannot take.

    Decoder-only: input, as `prompt` puts it, and target in one sequence, with the first of `ends` (`end_tokens`;
    default: the tokenizer's end) behind; labels on the target (on everything for a "text" row). Over `max_length`
    tokens the beginning of the input goes first, then the end of the target. Encoder-decoder: the input to the encoder,
    the target as labels, each cut at `max_length`.
    """
    row, prompt = as_example(row, text=True), prompt or PromptFormat()
    if ends is None:
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    end = list(ends[:1])
    if "input" not in row:
        if seq2seq:
            raise ValueError('an encoder-decoder model needs rows with "input" and "target", not "text"')
        ids = one_start(tokenizer(prompt.whole(row)).input_ids, tokenizer)
        ids = (ids + end if ids[-1:] != end else ids)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    asked = prompt.prompt(row, tokenizer)
    given = asked.ids(tokenizer, ends, seq2seq=seq2seq)
    ends = turn_ends(tokenizer, ends) if asked.special else ends
    target = target_ids(tokenizer, row["target"], ends, seq2seq=seq2seq)
    if seq2seq:
        return {"input_ids": given[:max_length], "labels": target[:max_length]}
    target = target[: max_length - 1]
    given = given[max(0, len(given) + len(target) - max_length) :]
    return {"input_ids": given + target, "labels": [IGNORED] * len(given) + target}


def collator(tokenizer: Any) -> Collate:
    """A function that pads encoded examples on the right into a batch of tensors."""
    import torch

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        longest = max(len(ids) for ids in lists)
        return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists], device="cpu")

    def collate(features: list[dict[str, list[int]]]) -> Batch:
        inputs = [feature["input_ids"] for feature in features]
        return {
            "input_ids": padded(inputs, pad),
            "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORED),
        }

    return collate
