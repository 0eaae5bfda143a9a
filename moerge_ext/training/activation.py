"""The mean input of every LoRA module over an expert's data: gates that need no training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..experts.fingerprint import note_of_adapter
from ..experts.formats.peft import write_gates
from ..experts.gates import gates_file
from ..experts.hub import output_folder
from ..experts.kinds import AVERAGE_ACTIVATION
from ..experts.prompt_notes import note_of_prompt
from ..experts.selection import Modules
from ..files.atomic import check_writable
from ..files.kept import check_replaced
from ..files.listing import grouped
from ..models.prompt import PromptFormat
from ..routing.fused_experts import Pairs
from ..routing.layers import execution_device
from ..routing.tokens import RealTokens
from .batches import BatchSource, Collate, run_model
from .encoding import MAX_LENGTH, prepare
from .gated_lora import GatedModel, gated_model
from .left_out import warn_of_left_out
from .random_state import seeded
from .ranks import Ranks, current_ranks

SAMPLES = 1000  # of an expert's data: PHATGOOSE, arXiv 2402.05859, section 4.2, baseline "Average Activation"


def average_activation(
    model: nn.Module,
    adapter_folder: str | Path,
    batches: Iterable[Any],
    *,
    tokenizer: Any = None,
    max_length: int = MAX_LENGTH,
    prompt: PromptFormat | None = None,
    collate_fn: Collate | None = None,
    batch_size: int = 8,
    samples: int | None = SAMPLES,
    seed: int = 0,
    modules: Modules = None,
    output_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write, for every LoRA module of an expert, the mean of its input u [D] over the tokens of `batches`.

        g = (1 / T) sum_t u_t       the baseline "Average Activation" of PHATGOOSE, arXiv 2402.05859,
        section 4.2

    The expert's LoRA is applied in every module (of those that `modules` takes, as for `load_experts`), so these are
    the expert's own activations; dropout is off.
    Sums are float64, the result is float32, kind "average-activation". Returns the file written (in
    `output_dir`, default `adapter_folder`, which may be a hub id with `output_dir`); one that is there is replaced by
    `overwrite` alone. The model is as before afterwards.

    Padding does not count: in a decoder-only model or an encoder the tokens where `attention_mask` is 0; in
    the decoder of an encoder-decoder those where `decoder_attention_mask` is 0 or, without one, where
    `labels` is -100 (its cross-attention keys and values read the encoder's tokens and follow
    `attention_mask`). The mask of speech is shortened as the model's convolutions shorten the speech. A module whose
    input has other leading sizes than the mask (a pooler's [N, D]) counts every row, as everything does without a mask.

    `batches` is one pass of ready batches, of rows of text with `tokenizer` and `prompt`, or with `collate_fn` of a
    list or Dataset of features, as in `train_gates`. Of rows and features `samples` are drawn at random with `seed`, if
    there are more: the paper's 1000, the same that `index_examples` draws for its baseline "Retrieval"; None takes all.
    Of ready batches all are taken: draw before you make them.
    A module that saw no token gets no gate: a warning names these, and `patch` masks the expert there. Under torchrun
    every rank must call this, each with its own part of the data, of which it draws its part of `samples`; rank 0
    writes the mean over all.

    Errors: ValueError for samples below 1, an adapter that does not fit the model, no batches, sums that are not
    finite, or when no module saw a token.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, or None for all, got {samples}")
    ranks = current_ranks()
    facts = {}
    if tokenizer is not None or collate_fn is not None:
        batches = drawn(batches, samples, seed, ranks.size)
        facts = {"samples": str(int(ranks.total([float(len(batches))])[0])), "seed": str(seed)}
    prepared = prepare(
        model, batches, None, tokenizer=tokenizer, max_length=max_length, collate_fn=collate_fn, prompt=prompt
    )
    source = BatchSource(prepared.data, name="batches", collate_fn=prepared.collate_fn, batch_size=batch_size)
    target = output_folder(adapter_folder, output_dir)
    ranks.from_first(lambda: check_replaced(gates_file(target, AVERAGE_ACTIVATION), overwrite=overwrite))
    with gated_model(model, adapter_folder, gate=False, modules=modules) as gated:
        with ranks.together():
            check_writable(target)
            means, count = _sums(gated, source, progress=progress and ranks.first)
        (count,) = ranks.total([float(count)])
        for mean in means.values():
            mean.add_ranks(ranks)
        if not count:
            raise ValueError("batches is empty: at least one batch is needed")
        seen = {path: mean for path, mean in means.items() if mean.count}
        problems = [f"{path}: its input is not finite" for path, mean in seen.items() if not mean.finite()]
        problems += [] if seen else [f"{path}: saw no token" for path in means]
        if problems:
            raise ValueError("no average activation for:\n- " + "\n- ".join(grouped(problems)))
        with ranks.together():
            if ranks.first:
                _write(target, gated, seen, {"batches": str(int(count)), **facts, **note_of_prompt(prepared.prompt)})
    return gates_file(target, AVERAGE_ACTIVATION)


def drawn(data: Any, samples: int | None, seed: int, parts: int = 1) -> Sequence[Any]:
    """`samples` different rows of `data`, or this process's share of them when there are `parts`; all if fewer."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        data = list(data)
    count = None if samples is None else -(-samples // parts)
    if count is None or len(data) <= count:
        return data
    return [data[i] for i in random.Random(seed).sample(range(len(data)), count)]


def _sums(gated: GatedModel, source: BatchSource, *, progress: bool) -> tuple[dict[str, _Mean], int]:
    """Every module's inputs added up over the batches, and the number of batches."""
    model, count = gated.model, 0
    with ExitStack() as stack:
        tokens = RealTokens(model, stack)
        means = {path: _Mean(layer, tokens) for path, layer in gated.layers.items()}
        for path, layer in gated.layers.items():
            stack.callback(layer.register_forward_pre_hook(means[path]).remove)
        model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(seeded(model, 0))
        label = f"activations of {gated.adapter.name}"
        for batch in tqdm(source.epoch(), desc=label, unit="batch", disable=not progress):
            count += 1
            tokens.begin(batch)
            run_model(model, batch)
            gated.still.put_back()
    return means, count


def _write(target: Path, gated: GatedModel, means: dict[str, _Mean], facts: dict[str, str]) -> None:
    unseen = gated.layers.keys() - means.keys()
    warn_of_left_out(gated.adapter.name, unseen, len(gated.layers))
    target.mkdir(parents=True, exist_ok=True)
    write_gates(
        target,
        {path: (mean.total / mean.count).float().cpu() for path, mean in means.items()},
        kind=AVERAGE_ACTIVATION,
        base_model=gated.base_model,
        metadata={
            **facts,
            **note_of_adapter(gated.adapter.name, gated.adapter.modules),
            "tokens": str(max(mean.count for mean in means.values())),
        },
    )


class _Mean:
    """Adds up one module's inputs."""

    def __init__(self, layer: nn.Module, tokens: RealTokens) -> None:
        self.tokens = tokens
        self.total = torch.zeros(layer.width, dtype=torch.float64, device=execution_device(layer))
        self.count = 0

    def __call__(self, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        u = args[0].detach()
        if len(args) > 1 and isinstance(args[1], Pairs):
            mask = self.tokens.mask(args[1].tokens)
            if mask is not None and args[0] is not args[1].tokens:
                mask = mask[args[1].token]
        else:
            mask = self.tokens.mask(u)
        u = u.flatten(0, -2) if mask is None else u.flatten(0, -2)[mask]
        self.total += u.sum(0, dtype=torch.float64)
        self.count += u.shape[0]

    def add_ranks(self, ranks: Ranks) -> None:
        """The sum over all processes."""
        total = torch.cat([self.total, self.total.new_tensor([self.count])])
        total = ranks.added(total)
        self.total, self.count = total[:-1], int(total[-1])

    def finite(self) -> bool:
        return bool(self.total.isfinite().all())
