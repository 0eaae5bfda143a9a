"""Which row of `affinities` or `queries` each token of a layer's input belongs to, where there are several rows.

A layer sees tokens. That they are those of the batch, one sequence after another, is read from the shapes of its input
and of the model's; where it does not follow from them, the forward is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.counting import counted
from .layers import add_pre_hook, is_container, remove_pre_hook

_SEQUENCES = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_OTHERS = ("pixel", "image", "video", "audio", "input_features", "input_values")  # how names of other inputs begin
_MARKS = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_id")
_TIME_FIRST = {"xlnet", "fsmt"}  # model types that compute in [length, batch, D]; the others of transformers do not


class Batch(NamedTuple):
    """What a forward of the model is given: `size` sequences, of one of `lengths` tokens."""

    size: int
    lengths: tuple[int, ...]
    packed: Tensor | None = None  # [T] int32: the row of each token, where all sequences lie in one
    others: bool = False  # whether there are images, or sounds
    others_even: bool = True  # each sequence has its one, or there are none


class Rows:
    """Maps tokens to `count` > 1 rows, for the forwards of `model` until `remove`.

    Each row has `size / count` neighbouring sequences of the batch (beams, several returned sequences); or the batch is
    one packed sequence, and each row one of its parts, by `cu_seq_lens_q` or by `position_ids` that start again. A
    forward for which `applies(self)` is False is not looked at.
    """

    def __init__(self, model: nn.Module, count: int, applies: Callable[[Rows], bool]):
        self.model, self.count, self.applies = model, count, applies
        self._now = threading.local()  # threads begun inside of one block share these rows
        self._seen: dict[str, set[bool]] = {}  # layer, or what holds it -> time first or not, where the shapes told
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._backbone = self._path_of_backbone()
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        self._encoder = model.get_encoder() if getattr(config, "is_encoder_decoder", False) else None
        self._by_convention = kind is not None and kind not in _TIME_FIRST
        parts = [m for m in model.modules() if m is model or hasattr(m, "main_input_name")]
        self._hooks = [(part, add_pre_hook(part, self._begin)) for part in parts]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _now=threading.local())

    @property
    def batch(self) -> Batch | None:
        """Of the forward that runs in this thread."""
        return getattr(self._now, "batch", None)

    @batch.setter
    def batch(self, batch: Batch | None) -> None:
        self._now.batch = batch

    def remove(self) -> None:
        for part, key in self._hooks:
            remove_pre_hook(part, key)
        self._hooks = []

    def of(self, name: str, x: Tensor) -> Tensor | None:
        """The row of each token of x [..., D], [T] int32; None where T/count adjacent tokens share a row.

        ValueError where the shapes do not tell.
        """
        batch, shape = self.batch, x.shape[:-1]
        if batch is None and len(shape) > 1 and shape[0] == self.count:
            return None  # a part of the model that is called by itself
        if batch is None:
            raise ValueError(
                f"{name}: {self.count} rows are set, and how many sequences the batch has is not known here: call the "
                "patched model itself, with its input_ids or inputs_embeds"
            )
        if batch.packed is not None:
            if shape.numel() != batch.packed.numel() or max(shape) != shape.numel():
                raise self._unknown(name, x)
            return batch.packed.to(x.device)
        elsewhere = batch.others and not self._in_backbone(name)
        if elsewhere and not batch.others_even:
            raise self._unknown(name, x)
        if len(shape) == 1:
            lists = self._lists_above(name)
            pooled = shape[0] == batch.size and not lists
            whole = shape[0] in [batch.size * length for length in batch.lengths] and lists < 2 and not elsewhere
            if not pooled and not whole:
                raise self._unknown(name, x)
            return None
        if self._is_time_first(name, x, batch):
            sequence = torch.arange(batch.size, dtype=torch.int32, device=x.device) // (batch.size // self.count)
            return sequence.repeat(shape[0])
        return None

    def _is_time_first(self, name: str, x: Tensor, batch: Batch) -> bool:
        """Whether x is [length, batch, D], not [batch, ..., D]; ValueError for anything else."""
        first, second = x.shape[0], x.shape[1]
        if first != batch.size:
            transposed = 0 < x.stride(0) < x.stride(1)  # a view of [batch, length, D]
            as_others = self._seen.get(_holder(name)) == {True}
            if x.dim() != 3 or second != batch.size or not (transposed or first in batch.lengths or as_others):
                raise self._unknown(name, x)
            return self._learned(name, True)
        if second != first or first == 1:
            return self._learned(name, False)
        # as many tokens as sequences: what this layer, or those beside it, saw before; or how transformers computes
        before = self._seen.get(name) or self._seen.get(_holder(name), set())
        if len(before) == 1:
            return next(iter(before))
        if first not in batch.lengths:
            raise self._unknown(name, x)
        if self._by_convention and x.is_contiguous():
            return False
        raise ValueError(
            f"{name}: whether its input {list(x.shape)} is [batch, length, D] or [length, batch, D] cannot be told: "
            f"run once, inside this block, a batch of {first} whose length is another"
        )

    def _learned(self, name: str, time_first: bool) -> bool:
        if not torch.compiler.is_compiling():  # a graph would be made again for each layer it has seen
            for path in (name, _holder(name)):
                self._seen.setdefault(path, set()).add(time_first)
        return time_first

    def _unknown(self, name: str, x: Tensor) -> ValueError:
        batch = self.batch
        lengths = " or ".join(map(str, batch.lengths))
        given = f"{batch.size} sequences" + (f" of {lengths} tokens" if lengths else "")
        given = "one packed sequence" if batch.packed is not None else given
        return ValueError(
            f"{name}: tokens are not in batch order here: its input is {list(x.shape)}, the batch {given}, so that it "
            f"is not known which of the {self.count} rows a token belongs to. Give one query at a time (or one for "
            "all), or leave this module out of the experts"
        )

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _path_of_backbone(self) -> str:
        """The part of the model that has the token embeddings; "" where that is the model itself or is not known."""
        try:
            embeddings = self.model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return ""
        path = next((path for path, module in self._modules.items() if module is embeddings), "")
        while path and not hasattr(self._modules[path], "main_input_name"):
            path = path.rpartition(".")[0]
        return path

    def _in_backbone(self, name: str) -> bool:
        head = "." not in name
        return head or not self._backbone or name.startswith(self._backbone + ".")

    def _lists_above(self, name: str) -> int:
        """How many lists of modules the layer is in: one of blocks, and another where it may be an expert of a mixture,
        which sees a choice of the tokens.
        """
        parts = name.split(".")
        above = (self._modules[".".join(parts[:end])] for end in range(1, len(parts)))
        return sum(isinstance(m, (nn.ModuleList, nn.ModuleDict)) or is_container(m) for m in above)

    # ---- the batch ---------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model, and of the models in it that are given sequences."""
        if not self.applies(self):
            return
        whole, before = module is self.model, self.batch
        given = [kwargs[key] for key in _SEQUENCES if isinstance(kwargs.get(key), Tensor)]
        if args and isinstance(args[0], Tensor) and args[0].dim() > 1 and (whole or not args[0].is_floating_point()):
            given.append(args[0])
        others = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and k.startswith(_OTHERS)}
        if whole:
            self.batch = before = None
            given = given or list(others.values())
        elif module is self._encoder and not given:  # of speech or images; `generate` calls it by itself
            given = [x for x in (*args[:1], kwargs.get(module.main_input_name)) if isinstance(x, Tensor)]
        given = [x for x in given if x.dim() > 1]
        if not given:
            return
        size, lengths = given[0].shape[0], tuple(x.shape[1] for x in given if x.dim() < 4)
        packed = self._packed(kwargs, size, lengths)
        if packed is None and size % self.count:
            raise ValueError(
                f"{self.count} rows of affinities are set and the model got a batch of {size}: give as many queries as "
                "sequences (or one for all)"
            )
        if whole:
            even = not others or self._one_each(others, kwargs.get("input_ids"), size)
            self.batch = Batch(size, lengths, packed, bool(others), even)
        else:
            self.batch = (before or Batch(size, lengths))._replace(size=size, lengths=lengths, packed=packed)

    def _one_each(self, others: dict[str, Tensor], ids: Tensor | None, size: int) -> bool:
        """Whether every sequence has one image (or sound): as many as sequences, and the same marks in each."""
        if any(x.shape[0] != size for x in others.values()):
            return False
        config = getattr(self.model, "config", None)
        marks = [m for key in _MARKS if isinstance(m := getattr(config, key, None), int)]
        if not marks or ids is None:
            return True
        counts = sum((ids == mark).sum(1) for mark in marks)
        return bool((counts == counts[0]).all() and counts[0] > 0)

    def _packed(self, kwargs: dict[str, Any], size: int, lengths: tuple[int, ...]) -> Tensor | None:
        """[T] int32, the row of each token of a packed batch; None for an ordinary one."""
        ends, positions, tokens = (
            kwargs.get("cu_seq_lens_q"),
            kwargs.get("position_ids"),
            size * (max(lengths) if lengths else 0),
        )
        before = None if self.batch is None else self.batch.packed
        if before is not None and before.numel() == tokens:
            return before  # a model in the model, which is given the same
        if isinstance(ends, Tensor):
            at = torch.arange(tokens, device=ends.device)
            rows, found = torch.bucketize(at, ends[1:-1].long(), right=True), ends.numel() - 1
        elif size % self.count and self._may_start_again(positions, kwargs.get("attention_mask"), size, tokens):
            # several axes of positions, as models with images have them, come first: the first is the text's
            line = positions.reshape(-1, tokens)[0].view(-1, positions.shape[-1])
            starts = torch.ones_like(line, dtype=torch.bool)
            starts[:, 1:] = line[:, 1:] != line[:, :-1] + 1
            rows = starts.flatten().cumsum(0) - 1
            found = int(rows[-1]) + 1
            if found == size > 1:
                return None  # one sequence a line, as many as do not fit
        else:
            return None
        if found != self.count:
            raise ValueError(
                f"{self.count} rows of affinities are set and the batch packs {counted(found, 'sequence')}: give "
                "as many queries as sequences (or one for all)"
            )
        return rows.int()

    def _may_start_again(self, positions: Any, mask: Any, size: int, tokens: int) -> bool:
        """Whether positions may be those of a packed batch; padding has positions too, which are no sequences."""
        if not isinstance(positions, Tensor) or positions.shape[-1] * size != tokens:
            return False
        return not (isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask == 0).any()))


def _holder(name: str) -> str:
    return name.rpartition(".")[0]
