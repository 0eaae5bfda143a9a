"""Examples as token ids and batches: what training and the search of weights give the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.pretrained import open_ids

if TYPE_CHECKING:
    from .batches import Batch, Collate

IGNORED = -100  # the label that no loss counts


def encode(row: dict[str, str], tokenizer: Any, max_length: int, *, seq2seq: bool) -> dict[str, list[int]]:
    """One example as token ids: "input_ids" and "labels".

    Decoder-only: input and target in one sequence, as they are, with an end-of-sequence token; labels on
    the target (on everything for a "text" row). Over `max_length` tokens the beginning of the input goes
    first, then the end of the target. Encoder-decoder: the input to the encoder, the target as labels, each
    cut at `max_length`.
    """
    if seq2seq:
        if "input" not in row:
            raise ValueError('an encoder-decoder model needs rows with "input" and "target", not "text"')
        return {
            "input_ids": tokenizer(row["input"]).input_ids[:max_length],
            "labels": tokenizer(text_target=row["target"]).input_ids[:max_length],
        }
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "input" not in row:
        ids = tokenizer(row["text"]).input_ids
        ids = (ids + end if ids[-1:] != end else ids)[:max_length]
        return {"input_ids": ids, "labels": list(ids)}
    given = open_ids(tokenizer, row["input"], end)
    target = (tokenizer(row["target"], add_special_tokens=False).input_ids + end)[: max_length - 1]
    given = given[max(0, len(given) + len(target) - max_length) :]
    return {"input_ids": given + target, "labels": [IGNORED] * len(given) + target}


def collator(tokenizer: Any) -> Collate:
    """A function that pads encoded examples on the right into a batch of tensors."""
    import torch

    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)

    def padded(lists: list[list[int]], value: int) -> torch.Tensor:
        longest = max(len(ids) for ids in lists)
        return torch.tensor([ids + [value] * (longest - len(ids)) for ids in lists])

    def collate(features: list[dict[str, list[int]]]) -> Batch:
        inputs = [feature["input_ids"] for feature in features]
        return {
            "input_ids": padded(inputs, pad),
            "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
            "labels": padded([feature["labels"] for feature in features], IGNORED),
        }

    return collate
